"""A thousand random lives of a batch: whatever happens to it, every sequence gets what it gets
in a single pass over its own tokens."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fast_transformers.masking import LengthMask, TriangularCausalMask
from fast_transformers.state import State
from fast_transformers.utils import make_mirror
from tests.support import assert_as_accurate
from tests.test_streaming import MODELS, encoder

HISTORIES, EVENTS, MOST = 1000, 8, 5  # in all; in each; sequences at once
VOCABULARY = torch.randn(16, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@dataclass
class Sequence:
    """Tokens that a model has read, and what it gave for each."""

    tokens: list[int] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def forked(self) -> Sequence:
        return Sequence([*self.tokens], [*self.outputs])


@dataclass
class Batch:
    """A state and the sequences that it is of; a value, as the state is."""

    sequences: list[Sequence]
    state: State

    def select(self, rows: list[int], *, reorder: bool) -> Batch:
        chosen = [self.sequences[i].forked() for i in rows]
        index = torch.tensor(rows, dtype=torch.long)
        return Batch(chosen, self.state.reorder(index) if reorder else self.state.select(index))


def joined(batches: list[Batch]) -> Batch:
    sequences = [sequence for batch in batches for sequence in batch.sequences]
    return Batch(sequences, State.join([batch.state for batch in batches]))


class World:
    """A model with its twin, and what happens."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.model = encoder(name, dtype=torch.float32)
        self.twin = encoder(name, recurrent=True, dtype=torch.float32)
        make_mirror(self.model, self.twin)
        self.exact = copy.deepcopy(self.model).double()

    def prefill(self, batch: Batch, rng: random.Random) -> Batch:
        """Some tokens for each sequence, padded on the left, on the right, or not at all."""
        n, width = len(batch.sequences), rng.randint(1, 6)
        padded = rng.random() < 0.7
        counts = [rng.randint(0, width) if padded else width for _ in range(n)]
        x, mask = torch.full((n, width, 12), torch.nan), torch.zeros(n, width, dtype=torch.bool)
        for i, count in enumerate(counts):
            at = slice(width - count, None) if rng.random() < 0.5 else slice(count)
            tokens = rng.choices(range(16), k=count)
            x[i, at], mask[i, at] = VOCABULARY[tokens].float(), True
            batch.sequences[i].tokens += tokens
        y, state = self.model(
            x, length_mask=mask if padded else None, state=batch.state, return_state=True
        )
        for i, sequence in enumerate(batch.sequences):
            sequence.outputs += y[i, mask[i]].unbind()
        return replace(batch, state=state)

    def step(self, batch: Batch, rng: random.Random) -> Batch:
        """A token for each sequence, in either form."""
        tokens = rng.choices(range(16), k=len(batch.sequences))
        x = VOCABULARY[tokens].float()
        if rng.random() < 0.5:
            y, state = self.twin(x, batch.state)
        else:
            y, state = self.model(x[:, None], state=batch.state, return_state=True)
        for sequence, token, out in zip(batch.sequences, tokens, y.view(-1, 12), strict=True):
            sequence.tokens.append(token)
            sequence.outputs.append(out)
        return replace(batch, state=state)

    def reorder(self, batch: Batch, rng: random.Random) -> Batch:
        """Beams: some sequences go on in several ways, others are given up."""
        n = len(batch.sequences)
        return batch.select(
            rng.choices(range(n), k=rng.randint(1, min(n + 1, MOST))), reorder=True
        )

    def leave(self, batch: Batch, rng: random.Random) -> Batch:
        n = len(batch.sequences)
        return batch.select(rng.sample(range(n), rng.randint(1, n)), reorder=False)

    def join(self, batch: Batch, rng: random.Random) -> Batch:
        """New sequences, read by themselves, come before or after the others."""
        room = MOST - len(batch.sequences)
        if room < 1:
            return batch
        both = [batch, self.begin(rng, rng.randint(1, room))]
        rng.shuffle(both)
        return joined(both)

    def fork(self, batch: Batch, rng: random.Random) -> Batch:
        """Two continuations of one state, neither of which knows of the other."""
        if 2 * len(batch.sequences) > MOST:
            return batch
        return joined(
            [
                rng.choice([self.step, self.prefill])(
                    Batch([s.forked() for s in batch.sequences], batch.state), rng
                )
                for _ in range(2)
            ]
        )

    def keep(self, batch: Batch, rng: random.Random) -> Batch:
        """Through a file, or into other memory."""
        what = rng.randrange(4)
        if what == 0:
            batch.state.save(self.path)
            return replace(batch, state=State.load(self.path))
        if what == 1:
            return replace(batch, state=batch.state.reserve(rng.randint(1, 30)))
        return replace(batch, state=batch.state.clone() if what == 2 else batch.state.detach())

    def begin(self, rng: random.Random, n: int) -> Batch:
        return self.prefill(Batch([Sequence() for _ in range(n)], State()), rng)

    def live(self, rng: random.Random) -> list[Sequence]:
        """A random history; the sequences at its end and those that left."""
        events = [
            self.prefill, self.step, self.step, self.reorder, self.leave, self.join, self.keep,
            self.fork,
        ]  # fmt: skip
        batch = self.begin(rng, rng.randint(1, 3))
        left = []
        for _ in range(EVENTS):
            before = batch
            batch = rng.choice(events)(batch, rng)
            positions = batch.state.positions.tolist()
            assert positions == [len(s.tokens) for s in batch.sequences]
            gone = {id(s) for s in before.sequences} - {id(s) for s in batch.sequences}
            left += [s for s in before.sequences if id(s) in gone]
        return [s for s in [*left, *batch.sequences] if s.tokens]

    def single_pass(self, sequences: list[Sequence], exact: bool) -> Tensor:
        """Outputs of all tokens of all sequences, without any state where that can be."""
        lengths = torch.tensor([len(s.tokens) for s in sequences])
        length = int(lengths.max())
        x = torch.zeros(len(sequences), length, 12, dtype=torch.float64)
        for i, s in enumerate(sequences):
            x[i, : len(s.tokens)] = VOCABULARY[s.tokens]
        model, x = (self.exact, x) if exact else (self.model, x.float())
        mask = LengthMask(lengths, max_len=length)
        if self.name.startswith("conditional"):  # beyond the limit a batch pass differs
            y, _ = model(x, length_mask=mask, return_state=True)
        else:
            y = model(x, TriangularCausalMask(length), mask)
        return y[mask.bool_matrix]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_histories(name, tmp_path):
    world = World(name, tmp_path / "state.safetensors")
    for seed in range(HISTORIES // len(MODELS) + 1):
        sequences = world.live(random.Random(seed))
        if not sequences:
            continue
        outputs = torch.stack([out for s in sequences for out in s.outputs])
        plain, exact = (world.single_pass(sequences, exact) for exact in (False, True))
        assert_as_accurate(outputs, plain, exact)
