"""The image models of "Transformers are RNNs" (Katharopoulos et al. 2020), with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast_transformers.builders import RecurrentEncoderBuilder, TransformerEncoderBuilder
from fast_transformers.masking import TriangularCausalMask
from fast_transformers.state import State
from fast_transformers.stepper import Stepper

VALUES, START = 256, 256  # of a pixel, and the token before the first one
HEADS, DIM = 8, 32
ATTENTIONS = {"linear": "causal-linear", "softmax": "full"}
SEED, CHECKED, ROWS = 0, 24, 3  # tokens and images that answers are compared on


@dataclass(frozen=True)
class Shape:
    """Layers and pixels of a model (section 4.2), and what the paper measured (tables 1, 2, 5).

    Attributes:
        layers: number of layers, of 8 heads with 32 dimensions.
        pixels: tokens of an image.
        throughput: images a second, by method.
        latency: seconds of one image alone, on a CPU and on a GPU, by method.
    """

    layers: int
    pixels: int
    throughput: dict[str, float]
    latency: dict[str, tuple[float, float]]


SHAPES = {
    "MNIST": Shape(
        8,
        784,
        {"softmax": 0.45, "softmax, cache": 7.56, "linear": 142.8},
        {"softmax": (72.6, 10.2), "softmax, cache": (7.4, 10.4), "linear": (5.5, 7.3)},
    ),
    "CIFAR": Shape(
        16,
        3072,
        {"softmax": 0.004, "softmax, cache": 0.32, "linear": 17.85},
        {"softmax": (8651.4, 300.1), "softmax, cache": (71.9, 70.4), "linear": (45.1, 61.3)},
    ),
}


class Pixels(nn.Module):
    """Embeddings, an encoder or its recurrent twin, and the logits of the next pixel.

    Args:
        shape: of the model.
        attention: "linear" or "softmax".
        recurrent: build the twin.
    """

    def __init__(self, shape: Shape, attention: str, recurrent: bool) -> None:
        super().__init__()
        builder = RecurrentEncoderBuilder if recurrent else TransformerEncoderBuilder
        self.values = nn.Embedding(VALUES + 1, HEADS * DIM)
        self.positions = nn.Embedding(shape.pixels, HEADS * DIM)
        self.encoder: Any = builder.from_kwargs(
            attention_type=ATTENTIONS[attention],
            n_layers=shape.layers,
            n_heads=HEADS,
            query_dimensions=DIM,
            value_dimensions=DIM,
            feed_forward_dimensions=4 * HEADS * DIM,
        ).get()
        self.head = nn.Linear(HEADS * DIM, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L) to logits (N, L, values), all at once."""
        length = tokens.shape[1]
        x = self.values(tokens) + self.positions.weight[:length]
        return self.head(self.encoder(x, TriangularCausalMask(length, device=x.device)))

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """(N,) and a state to logits (N, values) and the new state."""
        at = torch.as_tensor(state.position, device=token.device)
        x = self.values(token) + self.positions(at)
        y, state = self.encoder(x, state)
        return self.head(y), state

    def draw(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """(N,) and a state to the next pixel (N,), drawn by its probability, and the new state.

        The largest of logits with Gumbel noise: nobody has to wait for a sum of probabilities.
        """
        logits, state = self.step(token, state)
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        return (logits - noise.log()).argmax(-1), state


def make(shape: Shape, attention: str, device: str, dtype: torch.dtype) -> tuple[Pixels, Pixels]:
    """A model for whole sequences in float64, and its recurrent twin in ``dtype``."""
    torch.manual_seed(SEED)
    batch = Pixels(shape, attention, False).eval()
    twin = Pixels(shape, attention, True).eval()
    twin.load_state_dict(batch.state_dict())
    batch, twin = batch.to(device).double(), twin.to(device, dtype)
    return batch, twin


def begin(model: Pixels, n: int, step: Callable[..., Any]) -> tuple[Tensor, State]:
    """What comes out for the start tokens of ``n`` images, and the state after them."""
    device = model.head.weight.device
    return step(torch.full((n,), START, device=device), State())


@torch.inference_mode()
def disagreement(shape: Shape, attention: str, device: str, dtype: torch.dtype, form: str) -> str:
    """What is wrong with the logits of the steps, by those of a whole pass in float64; or "".

    They may be twice as far away as those of a whole pass in ``dtype`` are, and a rounding.
    """
    batch, twin = make(shape, attention, device, dtype)
    tokens = torch.randint(0, VALUES, (ROWS, CHECKED), device=device)
    tokens[:, 0] = START
    exact = batch(tokens)
    out, state = begin(twin, ROWS, twin.step)
    stepper = Stepper(twin.step, state, tokens=shape.pixels, form=form)
    rest = [stepper(tokens[:, i]) for i in range(1, CHECKED)]
    whole = batch.to(dtype)(tokens)

    def error(x: Tensor) -> float:
        return float((x.double() - exact).norm() / exact.norm())

    found, budget = error(torch.stack([out, *rest], 1)), 2 * error(whole)
    budget += torch.finfo(dtype).eps
    if found <= budget:
        return ""
    return f"{attention}, {form}: relative error {found:.1e}, allowed {budget:.1e}"


class Drawing:
    """Draws whole images again and again, with one graph.

    Args:
        model: the recurrent twin.
        shape: of the model.
        n: images at once.
        form: of the steps, see :class:`~fast_transformers.stepper.Stepper`.
        fresh: make the stepper anew for each image: caches of keys and values start small.
    """

    def __init__(self, model: Pixels, shape: Shape, n: int, form: str, fresh: bool) -> None:
        self.model, self.shape, self.n, self.form = model, shape, n, form
        self.fresh, self.stepper = fresh, None

    @torch.inference_mode()
    def __call__(self, pixels: int | None = None) -> Tensor:
        """(N, pixels) drawn pixels, by default all of an image."""
        count = pixels or self.shape.pixels
        token, state = begin(self.model, self.n, self.model.draw)
        if self.stepper is None or self.fresh:
            self.stepper = Stepper(
                self.model.draw, state, tokens=self.shape.pixels, form=self.form
            )
        else:
            self.stepper.restart(state)
        image = torch.empty(self.n, count, dtype=torch.uint8, device=token.device)
        image[:, 0] = token
        for i in range(1, count):
            token = self.stepper(token)
            image[:, i] = token
        return image


def timed(drawing: Drawing) -> float:
    """Seconds until complete images are there."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    image = drawing()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if drawing.n > 32 and bool((image == image[0]).all(0).any()):
        raise ArithmeticError("all images agree in a pixel: the values are not drawn")
    return seconds
