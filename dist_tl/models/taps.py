"""Finds a network's blocks, in depth order, and the linear layer at its end.

Every architecture names these parts differently, so both are found by structure and by one forward
pass, not by tables of names.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dist_tl.errors import ConfigError
from dist_tl.models.messages import one_line

_LISTS = (nn.ModuleList, nn.Sequential)


def block_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Yields the repeated blocks of a network, those inside stages too, in order of definition.

    A block is a composite member of a list (ModuleList or Sequential) that is not itself a list, a
    stage or a patch embedding. A stage has "Stage" in its class name, or lies outside any stage
    and has a ModuleList of composite members; a stage without a list counts as a list.
    """
    yield from _walk(root, in_stage=False)


def _walk(module: nn.Module, in_stage: bool) -> Iterator[nn.Module]:
    is_list = isinstance(module, _LISTS) or (_is_named_stage(module) and not _lists_in(module))
    for child in module.children():
        if not _is_composite(child) or "Embed" in type(child).__name__:
            continue
        if not is_list or isinstance(child, _LISTS) or _is_stage(child, in_stage):
            yield from _walk(child, in_stage or _is_named_stage(child))
        else:
            yield child


def _is_composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_named_stage(module: nn.Module) -> bool:
    return "Stage" in type(module).__name__


def _lists_in(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, _LISTS)]


def _is_stage(module: nn.Module, in_stage: bool) -> bool:
    if in_stage or _is_named_stage(module):
        return _is_named_stage(module)
    # ModuleList only: a Sequential inside a block is usually its convolutions.
    lists = (child for child in _lists_in(module) if isinstance(child, nn.ModuleList))
    return any(_is_composite(member) for items in lists for member in items)


def record_blocks(trunk: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns the outputs of all blocks in order of execution, then the trunk's own output.

    One forward pass; the hooks are removed when it returns or raises. Maps are (N, C, H, W), token
    sequences (N, T, D), depending on the architecture; the last item is (N, D).
    """
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    hooks = [block.register_forward_hook(record) for block in block_modules(trunk)]
    try:
        features = trunk(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [*outputs, features]


def detach_head(
    model: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor, *, name: str
) -> tuple[str, nn.Linear]:
    """Removes the linear layer whose output is the logits; the model then returns its input.

    One forward pass of `images`, in eval mode and without gradients, finds the linear layer that
    returned the logits tensor itself. The rest of the model followed by the head is therefore the
    same computation bit for bit.

    Args:
        model: changed in place: an identity replaces the head. Left in eval mode.
        logits_of: runs the model on images and returns its logits (N, C).
        images: one image (1, C, H, W) of the shape that the network takes.
        name: the model's name in error messages.

    Returns:
        The head's dotted name within the model, and the head.

    Raises:
        ConfigError: the model does not accept such images, or its logits are not the output of
            one linear layer on a feature vector.
    """
    calls: dict[str, tuple[nn.Linear, Tensor, Tensor]] = {}

    def recorder(
        path: str, linear: nn.Linear
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[path] = (linear, inputs[0], output)

        return record

    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [linear.register_forward_hook(recorder(path, linear)) for path, linear in linears]
    model.eval()
    try:
        with torch.no_grad():
            logits = logits_of(images)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shape = "x".join(str(size) for size in images.shape[1:])
        raise ConfigError(
            f"{name} does not accept {shape} images: {one_line(error)}; set resize to the size "
            "it expects, grey_to_rgb if it expects colour, or change its config"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for path, (head, inputs, output) in calls.items():
        if output is logits and inputs.ndim == 2:
            model.set_submodule(path, nn.Identity())
            return path, head
    raise ConfigError(
        f"{name}: its logits are not the output of one linear layer on a feature vector, so it "
        "cannot be split into trunk and head; choose another architecture"
    )
