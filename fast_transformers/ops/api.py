"""The three public functions: check, choose, call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import checks, exported, fused, packed, reference, stream
from .choose import resolve
from .features import IDENTITY, Features, sum_dtype, without_autocast
from .fused_step import fused_step, why_not_fused_step
from .state import Attended, LinearState, OwnedState, as_state
from .step import absorb, encode, encode_both, kind_of, look_up

State = LinearState | Sequence[Tensor] | None
_FORMS: dict[str, Callable[..., tuple[Tensor, LinearState]]] = {
    "triton": fused.attention,
    "chunked": stream.attention,
    "reference": reference.quadratic,
    "recurrent": reference.recurrent,
    "exported": exported.attention,
}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features | None = None,
    *,
    key_mask: Tensor | None = None,
    state: State = None,
    eps: float = 1e-6,
    impl: str = "auto",
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_keys: Tensor | None = None,
) -> Attended:
    """Every query attends to every key.

        out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps)

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 4 to 6.

    Args:
        q: (N, L, H, E) queries, of any floating dtype and any strides.
        k: (N, S, H, E) keys. Fewer heads than queries have are grouped-query attention: with
            H/R heads, query head h looks at key head h // R. Keys are not repeated in memory.
        v: (N, S, H, M) values, with the heads of the keys.
        features: the feature map; None if ``q`` and ``k`` are features already.
        key_mask: (N, S) bool, True = keep. Masked keys and values may hold anything.
        state: sums over earlier keys, which count as if they preceded ``k``.
        eps: added to the denominator. Exponential features need none and ignore it: their
            denominator is at least 1 in the units it is computed in. 0/0 is 0.
        impl: "auto", or a key of :data:`~fast_transformers.ops.FORMS`, which runs or raises.
        chunk_size: tokens per chunk of the chunked form; None chooses by the length.
        cu_seqlens: (B + 1,) integers, for B sequences packed one behind the other into inputs of
            shape (1, T, H, dim): where each begins, and T. Nothing crosses a boundary. ``state``
            is then that of the B sequences. Nested tensors of layout ``torch.jagged``,
            (N, length, H, dim), are packed sequences that know their boundaries. Kernels read
            the boundaries on the GPU, where nobody checks that they rise from 0 to T.
        cu_seqlens_keys: the same for keys and values; None if they have those of the queries.

    Returns:
        values (N, L, H, M) in the dtype of ``v``, and the state that includes ``k`` and ``v``;
        nested values for nested tensors.

    Raises:
        TypeError: for inputs or a state of the wrong type or dtype.
        ValueError: for shapes that do not fit, or an ``impl`` that cannot serve the call.
    """
    options = {"features": features, "eps": eps, "impl": impl, "chunk_size": chunk_size}
    options |= {"key_mask": key_mask, "state": state}
    sequences = (cu_seqlens, cu_seqlens_keys)
    return _attention(linear_attention, q, k, v, sequences, options, causal=False)


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features | None = None,
    *,
    key_mask: Tensor | None = None,
    state: State = None,
    eps: float = 1e-6,
    impl: str = "auto",
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_keys: Tensor | None = None,
) -> Attended:
    """Query i attends to the keys j <= i.

        out_i = sum_{j<=i} phi(q_i).phi(k_j) v_j / (sum_{j<=i} phi(q_i).phi(k_j) + eps)

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 8 to 12. With more keys than
    queries the keys beyond the last query are unseen and not in the state; with more queries
    than keys the last queries see every key.

    Arguments, results and errors are those of :func:`linear_attention`.
    """
    options = {"features": features, "eps": eps, "impl": impl, "chunk_size": chunk_size}
    options |= {"key_mask": key_mask, "state": state}
    sequences = (cu_seqlens, cu_seqlens_keys)
    return _attention(causal_linear_attention, q, k, v, sequences, options, causal=True)


def linear_attention_step(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Features | None = None,
    *,
    state: State = None,
    eps: float = 1e-6,
    inplace: bool = False,
) -> Attended:
    """One token of causal attention: absorb its key and value, then attend with its query.

        S = S + phi(k) v^T,   z = z + phi(k),   out = phi(q) S / (phi(q).z + eps)

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 16 to 20.

    Args:
        q: (N, H, E) query.
        k: (N, H, E) key, or None to attend to the state as it is (cross attention).
        v: (N, H, M) value, or None together with ``k``.
        features: as in :func:`linear_attention`.
        state: what an earlier step or a whole sequence returned; None starts a sequence. It is
            left as it is, so it can be continued in several ways.
        eps: as in :func:`linear_attention`.
        inplace: write the new state over the old one, which saves memory traffic. Not for a state
            that is to be continued in several ways, nor for gradients. An
            :class:`~.state.OwnedState` is always written over.

    Returns:
        values (N, H, M) in the dtype of ``q``, and the new state.

    Raises:
        TypeError, ValueError: as :func:`linear_attention`.
    """
    features = IDENTITY if features is None else features.by_functions
    checks.check_projection(features, q)
    with without_autocast(q):
        state = as_state(state, features.exponential)
        inplace = inplace or isinstance(state, OwnedState)
        sums = () if state is None else (state.kv, state.z)
        if k is None or v is None:
            if state is None:
                raise ValueError("state must be given when there is no key and value to absorb")
            dtype = state.kv.dtype
            kind = kind_of(features, dtype, q, *sums)
            b = encode(q, features, kind, dtype, of_keys=False)
        else:
            checks.check_inputs(q, k, v, dim=3)
            dtype = sum_dtype(q, k, v)
            checks.check_state(state, v, v.shape[0], dtype, features.exponential)
            kind = kind_of(features, dtype, q, k, v, *sums)
            if why_not_fused_step(q, k, v, features, kind, state) is None:
                return Attended(*fused_step(q, k, v, features, state, eps=eps, inplace=inplace))
            b, a = encode_both(q, k, features, kind, dtype)
            state = absorb(a, v, features, kind, state=state, inplace=inplace)
        values = look_up(b, state, kind, eps=eps, seen=k is not None)
        return Attended(values if values.dtype == q.dtype else values.to(q.dtype), state)


def _attention(
    function: Callable[..., Attended],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
    *,
    causal: bool,
) -> Attended:
    """Turn packed sequences into calls of ``function`` with a padded batch, unless a form takes
    them as they are; answer the others."""
    if isinstance(q, Tensor) and q.is_nested:
        return packed.nested(function, q, k, v, sequences, **options)
    checks.check_inputs(q, k, v)
    checks.check_key_mask(options["key_mask"], k)
    features = options["features"] = options["features"] or IDENTITY
    state = options["state"] = as_state(options["state"], features.exponential)
    cu_seqlens, cu_seqlens_keys = sequences
    if cu_seqlens is not None:
        packed.check(q, k, cu_seqlens, cu_seqlens_keys)
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype, chunk_size = v.dtype, options["chunk_size"]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    with without_autocast(q):
        for x in (q, k):
            checks.check_projection(features, x)
        checks.check_state(state, v, count, sum_dtype(q, k, v), features.exponential)
        impl = _form(options["impl"], q, k, v, features, causal)
        if impl == "triton" and features.formula is None:
            q, k, v, features = fused.evaluate(q, k, v, features, options["key_mask"])
            options["features"] = features
            impl = _form(options["impl"], q, k, v, features, causal)  # as many as there are
        if impl != "triton":
            options["features"] = features.by_functions
        if cu_seqlens is not None:
            options |= {"cu_seqlens": cu_seqlens, "cu_seqlens_keys": cu_seqlens_keys}
            if impl != "triton" or (causal and cu_seqlens_keys is not None):
                values, state = packed.packed(function, q, k, v, **options)
                return Attended(values.to(dtype), state)
        del options["impl"]
        if impl != "chunked":
            del options["chunk_size"]
        values, state = _FORMS[impl](q, k, v, causal=causal, **options)
        return Attended(values.to(dtype), state)


def _form(impl: str, q: Tensor, k: Tensor, v: Tensor, features: Features, causal: bool) -> str:
    return resolve(
        impl,
        causal=causal,
        length=q.shape[1],
        keys=k.shape[1],
        device=q.device,
        dtype=q.dtype if q.dtype == k.dtype == v.dtype else None,
        dims=(q.shape[-1], v.shape[-1]),
        features=features,
    )
