"""Checkpoints: read a file safely, load a network strictly, identify weights by their content.

Most of it is messages: every kind of broken file has one.
"""

import hashlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import WeightsError, did_you_mean, first_line

WRAPPERS = ("state_dict", "model", "student")
PREFIXES = ("module.", "_orig_mod.")


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint (safetensors, or torch's zip or pickle with weights only), on the CPU.

    Unwraps `state_dict`, `model` and `student`, strips `module.` and `_orig_mod.`. Raises WeightsError (exit 3) for a
    file that is missing, cut short, not a checkpoint, or that would run code.
    """
    head = _head(path)
    length = int.from_bytes(head[:8], "little")  # of a safetensors header; other formats give an impossible length
    if head[8:9] == b"{" and length < 100_000_000:
        return _strip(_read_safetensors(path))
    if not head.startswith((b"PK", b"\x80")):
        raise WeightsError(f"{path} is not a checkpoint: it looks like {_looks(head)}", hint=_USE_ANOTHER)
    return _strip(_unwrap(_read_torch(path), path))


_USE_ANOTHER = "Name a .safetensors file or one written by torch.save(network.state_dict())."
_COPY_AGAIN = "Copy or download it again and compare its size and sha256 with the original's."


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, not a checkpoint", hint=_USE_ANOTHER)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
        raise WeightsError(f"no checkpoint at {path}", hint=near or "Check the path.") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}", hint="Check its permissions.") from None
    if not head:
        raise WeightsError(f"{path} is empty", hint=_COPY_AGAIN)
    return head


def _looks(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches the file itself)"
    if head.lstrip()[:1] == b"<":
        return "a web page, saved in place of the file"
    return "text" if all(32 <= b < 127 or b in b"\r\n\t" for b in head) else "something else"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is broken or cut short (safetensors: {error})", hint=_COPY_AGAIN) from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types; all mean that the file cannot be read
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and re.search(r"(?i)unsupported|not an allowed", text):
            what = re.search(r"GLOBAL ([\w.]+)", text)
            named = f" ({what.group(1)})" if what else ""
            raise WeightsError(
                f"{path} holds pickled code{named}, not only tensors; kdcli does not run it",
                hint="If you trust it, load it yourself and save the tensors only: "
                "torch.save(network.state_dict(), 'weights.pth').",
            ) from None
        raise WeightsError(f"{path} is broken or cut short ({first_line(error)})", hint=_COPY_AGAIN) from None


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(found, Mapping):
            break
        inner = next((found[k] for k in WRAPPERS if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    if isinstance(found, Mapping) and found and all(isinstance(v, Tensor) for v in found.values()):
        return {str(k): v for k, v in found.items()}
    held = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
    raise WeightsError(f"{path} holds no network's tensors (it holds {held or 'nothing'})", hint=_USE_ANOTHER)


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(2):  # DataParallel around a compiled network, or a compiled network around DataParallel
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in state):
                state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def fill(module: nn.Module, state: Mapping[str, Tensor], *, arch: str, where: str) -> None:
    """Load every tensor of `state` into `module`, strictly; the module stays as it is unless all of them fit.

    arch: the architecture's name, with or without source; the zoo's networks also take the tensor names of other
    repositories (`kdcli.models.cifar.translate`). where: what messages call the state.
    Raises WeightsError (exit 3) with how many names matched and the first that did not, or that only the heads differ.
    """
    target = module.state_dict()
    given = renamed(arch, dict(state))
    shared = target.keys() & given.keys()
    shapes = sorted(k for k in shared if target[k].shape != given[k].shape)
    missing, extra = [k for k in target if k not in given], [k for k in given if k not in target]
    if missing and all(k.endswith("num_batches_tracked") for k in missing):  # written by a torch without this counter
        given |= {k: torch.zeros_like(target[k]) for k in missing}
        missing = []
    if shapes and not missing and not extra and _heads_only(shapes, target, given):
        has, wants = given[shapes[0]].shape[0], target[shapes[0]].shape[0]
        raise WeightsError(f"{where}: its head has {has} classes, {arch} here has {wants}", hint=class_cure(arch))
    if missing or extra or shapes:
        wrong = [f"{k}: {list(given[k].shape)} in the file, {list(target[k].shape)} in the network" for k in shapes[:3]]
        wrong += [f"{k}: not in the file" for k in missing[:3]] + [f"{k}: not in the network" for k in extra[:3]]
        fit = len(shared) - len(shapes)
        raise WeightsError(
            f"{where} is not a checkpoint of {arch}: {fit} of the network's {len(target)} tensors match, the file has "
            f"{len(given)}. First differences: " + "; ".join(wrong[:4]),
            hint="Name the architecture that the file was trained with: ARCHITECTURE@PATH. `kdcli models` lists them.",
        )
    broken = [k for k, v in given.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise WeightsError(
            f"{where}: {broken[0]} has values that are NaN or infinite",
            hint="Its training diverged; use an earlier epoch.",
        )
    ready: OrderedDict[str, Tensor] = OrderedDict(given)
    ready._metadata = getattr(target, "_metadata", {})  # pyright: ignore  # layout versions: mnasnet refuses without
    module.load_state_dict(ready, strict=True)


def digest(of: Mapping[str, Tensor] | nn.Module) -> str:
    """sha256 over the sorted names, dtypes, shapes and bytes of a state: equal weights have equal digests."""
    state: Mapping[str, Tensor] = of.state_dict() if isinstance(of, nn.Module) else of
    sha = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        sha.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def renamed(arch: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with its tensors under the names that kdcli's networks use."""
    bare = arch.rpartition(":")[2]
    if bare.startswith("cifar_"):
        from kdcli.models.cifar import translate

        return translate(bare, state)
    if bare in ("googlenet", "inception_v3"):  # without the auxiliary heads, which kdcli builds them without
        return {k: v for k, v in state.items() if not k.startswith(("aux1.", "aux2.", "AuxLogits."))}
    return state


def _heads_only(keys: list[str], target: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether the tensors differ in their first dimension only, and all by the same two counts."""
    counts = {(target[k].shape[:1], given[k].shape[:1]) for k in keys}
    return len(counts) == 1 and all(target[k].shape[1:] == given[k].shape[1:] and target[k].ndim for k in keys)


def class_cure(arch: str, data_name: str = "DATA", role: str = "mentor") -> str:
    """The hint where a head's class count is not the data's."""
    cures = [f"Train one for these classes: kdcli train --model {arch} --data {data_name}"]
    if role == "mentor":
        cures.append("or map the classes: --set classroom.class_map=auto")
    return ", ".join(cures)
