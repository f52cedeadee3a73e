"""Generate with a trained model: digits, completed digits, copies, recalled values, text."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .data import LEVELS, SEPARATOR, SIDE, START, SYMBOLS, digit_sequences, load_digits
from .modeling import FastTransformerForCausalLM
from .recall import draw_recalls
from .state import RecurrentState

PIXELS = SIDE * SIDE


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: smallest share of probability that the likeliest tokens, which stay, must have.
        seed: of the choices.
        use_cache: generate with the recurrent twin; else recompute the sequence for each token.
        form: of the steps, as :class:`~fast_transformers.stepper.Stepper` takes it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    use_cache: bool = True
    form: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be from 0 to 100, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.form == "compiled" and not self.use_cache:
            raise ValueError("form='compiled' is for steps, which use_cache=False leaves out")


@dataclass(frozen=True)
class Generated:
    """Generated tokens, and how long they took.

    Attributes:
        tokens: (N, T) without the prompts, on the CPU.
        seconds: from the first token of the prompts to the last generated one, without what
            compiling took before.
        form: of the steps: "graph", "graph of compiled kernels", "compiled", "plain", or
            "recomputed sequences".
    """

    tokens: Tensor
    seconds: float
    form: str

    @property
    def speed(self) -> str:
        """Sequences and tokens a second, and how, for a person."""
        n, count = len(self.tokens), self.tokens.numel()
        rates = f"{n / self.seconds:.1f} sequences/s, {count / self.seconds:.0f} tokens/s"
        return f"{rates} ({self.how})"

    @property
    def how(self) -> str:
        """The form of the steps, for a person."""
        if self.form.startswith("graph"):
            return f"CUDA {self.form}"
        return f"{self.form} steps" if self.form in ("plain", "compiled") else self.form


def generate(
    model: FastTransformerForCausalLM,
    prompts: Tensor,
    count: int,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> Generated:
    """Continue prompts (N, P) by ``count`` tokens each; the random state stays as it is.

    Raises:
        ValueError: if prompt and continuation are longer than the model's positions.
    """
    length = prompts.shape[1] + count
    if not model.config.rotary and length > model.config.n_positions:
        raise ValueError(
            f"{prompts.shape[1]} tokens of prompt and {count} new ones are more than the model's "
            f"{model.config.n_positions} positions; ask for fewer"
        )
    options: dict[str, Any] = {
        "max_new_tokens": count,
        "use_cache": sampling.use_cache,
        "do_sample": sampling.temperature > 0,
    }
    if sampling.temperature > 0:
        options.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    prompts = prompts.to(model.device)
    if sampling.form == "compiled":  # now, so that it does not count: in the second step
        run(model, prompts, sampling, {**options, "max_new_tokens": min(count, 3)})
    start = time.perf_counter()
    tokens, form = run(model, prompts, sampling, {**options, "streamer": streamer})
    seconds = time.perf_counter() - start
    return Generated(tokens[:, prompts.shape[1] :], seconds, form)


def run(
    model: FastTransformerForCausalLM, prompts: Tensor, sampling: Sampling, options: dict[str, Any]
) -> tuple[Tensor, str]:
    """Prompts with their continuations, on the CPU, and the form of the steps."""
    cache = RecurrentState(form=sampling.form) if sampling.use_cache else None
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        tokens = cast(Any, model).generate(prompts, past_key_values=cache, **options).cpu()
    return tokens, "recomputed sequences" if cache is None else cache.form


def draw_digits(
    model: FastTransformerForCausalLM, classes: Tensor, sampling: Sampling
) -> Generated:
    """Images of the given classes (N,); the tokens are pixels (N, 64)."""
    return generate(model, classes[:, None] + LEVELS, PIXELS, sampling)


def complete_digits(
    model: FastTransformerForCausalLM, n: int, sampling: Sampling
) -> tuple[Tensor, Tensor, Generated]:
    """Draw the lower half of the first ``n`` held-out digits.

    Returns:
        Completed images (n, 64), the originals (n, 64), and what was generated.
    """
    images, classes, first = load_digits()
    if n > len(images) - first:
        raise ValueError(f"there are {len(images) - first} held-out digits, got n={n}")
    images, classes = images[first : first + n], classes[first : first + n]
    given = digit_sequences(images, classes)[:, : 1 + PIXELS // 2]
    lower = generate(model, given, PIXELS // 2, sampling)
    return torch.cat([given[:, 1:], lower.tokens], 1), images, lower


def copy_symbols(
    model: FastTransformerForCausalLM, n: int, length: int, sampling: Sampling
) -> tuple[Tensor, Generated]:
    """Random symbols (n, length), and the model's copy of them.

    Raises:
        ValueError: for more symbols than the model was trained to copy.
    """
    most = (model.config.task or {})["most"]
    if not 1 <= length <= most:
        raise ValueError(f"the model copies from 1 to {most} symbols, got {length}")
    generator = torch.Generator().manual_seed(sampling.seed)
    symbols = torch.randint(0, SYMBOLS, (n, length), generator=generator)
    prompts = torch.cat([symbols, torch.full((n, 1), SEPARATOR)], 1)
    return symbols, generate(model, prompts, length, sampling)


def recall_values(
    model: FastTransformerForCausalLM, n: int, pairs: int, sampling: Sampling
) -> tuple[Tensor, Generated]:
    """Random pairs and one of their keys (n, 2 pairs + 1), and the model's value for it.

    Returns:
        The whole sequences (n, 2 pairs + 2), with the right value at the end, and the answers.

    Raises:
        ValueError: for more pairs than the model was trained with.
    """
    most = (model.config.task or {})["most"]
    if not 1 <= pairs <= most:
        raise ValueError(f"the model recalls from 1 to {most} pairs, got {pairs}")
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = draw_recalls(n, pairs, generator)[0][:, : 2 * pairs + 2]
    return tokens, generate(model, tokens[:, :-1], 1, sampling)


def continue_text(
    model: FastTransformerForCausalLM,
    prompt: bytes,
    count: int,
    sampling: Sampling,
    write: Callable[[str], Any],
) -> Generated:
    """Continue a text by ``count`` bytes; what is not UTF-8 in it is written as U+FFFD.

    Args:
        write: called with each piece of the continuation as it comes.
    """
    tokens = torch.tensor([[START, *prompt]])
    return generate(model, tokens, count, sampling, _Utf8(write))


class _Utf8(BaseStreamer):
    """Writes bytes as text as soon as a character is complete."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write, self._is_prompt = write, True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, value: Tensor) -> None:
        if not self._is_prompt:
            self._write(self._decoder.decode(bytes(value.flatten().tolist())))
        self._is_prompt = False

    def end(self) -> None:
        self._write(self._decoder.decode(b"", final=True))
