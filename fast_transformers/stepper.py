"""Generation token by token, each step replayed as a CUDA graph where there can be one.

A step of a small model is bound by the launches of its kernels, not by what they compute; a graph
launches all of them at once, and torch.compile makes fewer of them. Both need tensors that stay
where they are, so the loop that generates owns its state and each step writes over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .compiled import compile_step, why_not_compile
from .events import EventDispatcher
from .state import State
from .state.fixed import fix, longest, released, tensors_of, write_over

DEVICES = ("cuda",)
FORMS = ("auto", "graph", "compiled", "plain")


def why_not_graph(device: torch.device | str) -> str | None:
    """The reason why steps on a device cannot be replayed as a graph now; None if they can."""
    kind = torch.device(device).type
    if kind not in DEVICES:
        return f"the tensors are on a device of type {kind}, graphs need cuda"
    return _why_not_fixed()


def why_not_compiled(device: torch.device | str) -> str | None:
    """The reason why steps on a device cannot be compiled now; None if they can."""
    return why_not_compile(device) or _why_not_fixed()


def _why_not_fixed() -> str | None:
    if EventDispatcher.anybody_listens():
        return "somebody listens for events, which only plain steps dispatch"
    return None


def explain_steps(
    device: torch.device | str, form: str = "auto", cannot: str | None = None
) -> dict[str, str]:
    """For each of "graph", "compiled" and "plain": "chosen", or "no: " and why.

    Compiled kernels can go into a graph: both are chosen then.

    Args:
        device: that a model would be on.
        form: that is asked for, see :class:`Stepper`.
        cannot: why a certain step can be neither, if that is known.
    """
    if form == "plain":
        cannot = "plain steps were asked for"
    compiled = cannot or why_not_compiled(device)
    graph = (compiled if form == "compiled" else cannot) or why_not_graph(device)
    if form != "compiled" and compiled is None:
        compiled = "compiling takes many seconds; ask for it with form='compiled'"
    reasons = {"graph": graph, "compiled": compiled}
    answers = {name: f"no: {reason}" if reason else "chosen" for name, reason in reasons.items()}
    if graph is None:
        return {**answers, "plain": "no: a graph launches all kernels at once"}
    if compiled is None:
        return {**answers, "plain": "no: compiled steps were asked for"}
    return {**answers, "plain": "chosen"}


class Stepper:
    """A loop's own state, and the step that moves it on.

        stepper = Stepper(rnn, state)      # the state of a prompt; it stays as it is
        for _ in range(count):
            y = stepper(x)                 # instead of y, state = rnn(x, state)

    The first step runs as it is; from the second on a graph is replayed, with whatever ``step``
    does in it: embedding, layers, head, sampling (from CUDA's own generator). Caches of keys and
    values are read as a whole then; they start with little room, and when it is used up they
    grow by half, and another graph is captured. In plain steps states are ordinary values.

    Compiled steps have to be asked for: torch.compile takes many seconds for the first of them
    (and, with caches, for the one after they have grown), and on a CPU it needs a C++ compiler.
    What they save is in docs/generation.md.

    Args:
        step: called with the inputs and a state; returns outputs (a tensor, or several) and the
            new state. It must not wait for the device, and do the same for every token.
        state: of at least one token.
        tokens: most tokens in all, if known: caches do not grow beyond.
        form: "graph"; "compiled", which is a graph of compiled kernels where there can be a
            graph; "plain"; or "auto": a graph if there can be one, else plain.

    Raises:
        ValueError: for a state that has seen nothing, or an unknown ``form``.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, State]],
        state: State,
        *,
        tokens: int | None = None,
        form: str = "auto",
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if not state.batch_size:
            raise ValueError(
                "state must have seen a token, got one that has seen none; call step for the "
                "first token with State(), and hand over what it returns"
            )
        self.step = compile_step(step) if form == "compiled" else step
        self._tokens, self._form = tokens, form
        self._state, self._fixed = state, False
        self._device = state.positions.device
        # why this step can be in no other form than plain, as far as that is known for good
        self._cannot = why_not_compile(self._device) if form == "compiled" else None
        self._first = state.position if isinstance(state.position, int) else None
        self._steps = 0
        self._room, self._left = 0, None  # of caches of keys and values; tokens until they grow
        self._inputs: list[Tensor] = []
        self._warm, self._replay = False, None

    @property
    def state(self) -> State:
        """What has been read so far, as a value of its own; waits for the device."""
        if not self._fixed:
            return self._state
        return released(self._state, None if self._first is None else self._first + self._steps)

    def explain(self) -> dict[str, str]:
        """Which form the next step takes, and why not the others; see :func:`explain_steps`."""
        return explain_steps(self._device, self._form, self._cannot)

    @property
    def form(self) -> str:
        """That of the next step: "graph", "graph of compiled kernels", "compiled" or "plain"."""
        chosen = [name for name, answer in self.explain().items() if answer == "chosen"]
        return " of ".join(chosen) + " kernels" * (len(chosen) > 1)

    def restart(self, state: State) -> None:
        """Go on from another state of the same model and batch, with the same graph if it fits."""
        self._first = state.position if isinstance(state.position, int) else None
        self._steps = 0
        length = longest(state)
        if not self._fixed or (length is not None and length >= self._room):
            self._state, self._fixed = state, False
            return
        with torch.inference_mode(False), torch.no_grad():
            write_over(self._state, fix(state, self._room))
        self._left = None if length is None else self._room - length

    def reorder(self, index: Tensor) -> None:
        """Go on with the given sequences (1-D int64); as many as before may keep the graph."""
        if not self._fixed or len(index) != self._state.batch_size:
            self._state, self._fixed, self._inputs = self.state.reorder(index), False, []
            return
        for x in tensors_of(self._state):
            if x.ndim:
                x.copy_(x.index_select(0, index.to(x.device)))

    def __call__(self, *inputs: Tensor) -> Any:
        """Outputs of one token, which are nobody else's; without gradients.

        Raises:
            ValueError: for inputs of other shapes or dtypes than before, in a graph.
            RuntimeError: if a graph or a compiled step was asked for and cannot be; it says why.
        """
        with torch.inference_mode(False), torch.no_grad():
            if self._fits():
                self._prepare(inputs)
            if self._fits():
                outputs = self._fixed_step(inputs)
            elif self._form in ("graph", "compiled"):
                reason = self.explain()[self._form].removeprefix("no: ")
                raise RuntimeError(f"no {self._form} step can be taken: {reason}; use form='auto'")
            else:
                self._state, self._fixed = self.state, False
                outputs, self._state = self.step(*inputs, self._state)
            self._steps += 1
            return outputs

    def _fits(self) -> bool:
        """Whether the next step is not a plain one."""
        if self._cannot is not None or self._form == "plain":
            return False
        if self._form == "compiled":
            return _why_not_fixed() is None
        return why_not_graph(self._device) is None

    def _prepare(self, inputs: tuple[Tensor, ...]) -> None:
        """Have the state in tensors of constant shapes with room for a token, and a graph."""
        try:
            if not self._fixed or self._left == 0:
                state = self.state
                length = longest(state)
                if length is not None:
                    self._room = self._room_for(length)
                    self._left = self._room - length
                self._state, self._fixed = fix(state, self._room), True
                self._warm, self._replay = False, None
            if self._warm and self._replay is None and why_not_graph(self._device) is None:
                self._replay = record(self._run, self._device)
        except (ValueError, RuntimeError) as error:
            self._cannot = f"{type(error).__name__}: {error}".splitlines()[0]

    def _room_for(self, length: int) -> int:
        room = max(length + length // 2, 64)
        return room if self._tokens is None else max(min(room, self._tokens), length + 1)

    def _fixed_step(self, inputs: tuple[Tensor, ...]) -> Any:
        if not self._inputs:
            self._inputs = [x.clone() for x in inputs]
        for buffer, x in zip(self._inputs, inputs, strict=True):
            if (buffer.shape, buffer.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"inputs must be as those of the first step, {tuple(buffer.shape)} of "
                    f"{buffer.dtype}, got {tuple(x.shape)} of {x.dtype}; make another Stepper"
                )
            buffer.copy_(x)
        outputs = self._run() if self._replay is None else self._replay()
        self._warm = True  # kernels are compiled now, which a graph cannot hold
        if self._left is not None:
            self._left -= 1
        return outputs if self._replay is None else tree_map(Tensor.clone, outputs)

    def _run(self) -> Any:
        outputs, new = self.step(*self._inputs, self._state)
        write_over(self._state, new)
        return outputs


def record(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A call as a CUDA graph; replayed, it returns what it computed anew in the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
