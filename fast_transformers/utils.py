"""Share weights between models, such as a batch one for training and its recurrent twin."""

from __future__ import annotations

from torch.nn import Module


def make_mirror(src_module: Module, dst_module: Module) -> None:
    """Make `dst_module` use the very parameters and buffers of `src_module`, path by path.

    Whatever changes them in place, as optimizers, `load_state_dict` and the redrawing of random
    features do, changes both models. Parameters tied in `src_module` are tied in `dst_module`.
    Those that only `dst_module` has are left alone. Call it after moving `src_module` to its
    device: `Module.to` may put new buffers in place of the shared ones.

    Raises:
        AttributeError: `dst_module` lacks the submodule that would hold one of them.
    """
    for path, parameter in src_module.named_parameters(remove_duplicate=False):
        owner, name = _owner(dst_module, path)
        setattr(owner, name, parameter)
    for path, buffer in src_module.named_buffers(remove_duplicate=False):
        owner, name = _owner(dst_module, path)
        transient = _owner(src_module, path)[0]._non_persistent_buffers_set
        owner.register_buffer(name, buffer, persistent=name not in transient)


def _owner(root: Module, path: str) -> tuple[Module, str]:
    """The submodule that holds the tensor at the dotted `path`, and its name there."""
    prefix, _, name = path.rpartition(".")
    try:
        return root.get_submodule(prefix), name
    except AttributeError as error:
        raise AttributeError(
            f"dst_module must have the submodules of src_module, got one without {prefix!r}, "
            f"which should hold {path!r}; build both with the same parameters"
        ) from error
