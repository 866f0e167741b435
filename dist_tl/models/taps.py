"""Where a network can be cut open: its blocks, in depth order, and the linear layer at its end.

Libraries name these parts differently in every architecture, so both are found by structure and
by running the network once, not by name tables.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dist_tl.errors import ConfigError
from dist_tl.models.wording import one_line

_LISTS = (nn.ModuleList, nn.Sequential)


def block_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a network, stages opened up, in order of definition.

    A block is a composite member of a list (ModuleList or Sequential) that is neither a list, nor
    a stage, nor an embedding of patches. A stage is called so, or outside any stage keeps its own
    ModuleList of composite members; one without a list is a list itself.
    """
    yield from _walk(root, in_stage=False)


def _walk(module: nn.Module, in_stage: bool) -> Iterator[nn.Module]:
    is_list = isinstance(module, _LISTS) or (_is_called_stage(module) and not _lists_in(module))
    for child in module.children():
        if not _is_composite(child) or "Embed" in type(child).__name__:
            continue
        if not is_list or isinstance(child, _LISTS) or _is_stage(child, in_stage):
            yield from _walk(child, in_stage or _is_called_stage(child))
        else:
            yield child


def _is_composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_called_stage(module: nn.Module) -> bool:
    return "Stage" in type(module).__name__


def _lists_in(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, _LISTS)]


def _is_stage(module: nn.Module, in_stage: bool) -> bool:
    if in_stage or _is_called_stage(module):
        return _is_called_stage(module)
    # ModuleList only: a Sequential inside a block is usually its convolutions.
    lists = (child for child in _lists_in(module) if isinstance(child, nn.ModuleList))
    return any(_is_composite(member) for items in lists for member in items)


def record_blocks(trunk: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs of every block of `trunk` in the order they ran, then the trunk's own output.

    One forward pass; the hooks are gone when it returns or raises. Maps are (N, C, H, W), token
    sequences (N, T, D), as the architecture makes them; the last item is (N, D).
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    hooks = [block.register_forward_hook(keep) for block in block_modules(trunk)]
    try:
        features = trunk(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [*outputs, features]


def detach_head(
    model: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor, *, name: str
) -> tuple[str, nn.Linear]:
    """Take out the linear layer whose output is the logits; the model then returns its input.

    The layer is found by running `images` once, in eval mode and without gradients, and asking
    which linear layer returned the very tensor that came out. So what stays, followed by the
    head, is the same computation bit for bit.

    Args:
        model: changed in place: the head's place is taken by an identity. Left in eval mode.
        logits_of: runs the model on images and returns its logits (N, C).
        images: one image (1, C, H, W) of the shape the network will be given.
        name: what the model is called in errors.

    Returns:
        The head's dotted name within the model, and the head.

    Raises:
        ConfigError: the model cannot take such images, or its logits are not one linear layer of
            a feature vector.
    """
    found: dict[str, tuple[nn.Linear, Tensor, Tensor]] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[path] = (module, inputs[0], output)

        return keep

    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [module.register_forward_hook(watch(path)) for path, module in linears]
    model.eval()
    try:
        with torch.no_grad():
            logits = logits_of(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shape = "x".join(str(size) for size in images.shape[1:])
        raise ConfigError(
            f"{name} cannot take {shape} images: {one_line(error)}; set resize to the size "
            "it was made for, grey_to_rgb if it wants colour, or change its config"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for path, (head, inputs, output) in found.items():
        if output is logits and inputs.ndim == 2:
            model.set_submodule(path, nn.Identity())
            return path, head
    raise ConfigError(
        f"{name}: its logits are not one linear layer of a feature vector, so it cannot be split "
        "into trunk and head; choose another architecture"
    )
