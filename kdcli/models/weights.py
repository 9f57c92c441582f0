"""Weights: read a checkpoint safely, fill a network strictly, name them by content, and choose which to use.

Long because every way a file can be wrong has its own sentence here.
"""

import hashlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcli.errors import WeightsError, did_you_mean
from kdcli.models import cards
from kdcli.models.cards import Card
from kdcli.models.registry import ModelName, create, has_pretrained, names_weights

WRAPPERS = ("state_dict", "model", "student")
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Found:
    """The weights a network starts from."""

    state: dict[str, Tensor] | None  # None: from scratch, or the library's own (`pretrained`)
    origin: str  # what to print
    num_classes: int | None  # of the weights' head; None: unknown, or there is no head yet
    card: Card | None
    pretrained: bool  # to be loaded by `names.create(..., pretrained=True)`


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint (safetensors, or torch's zip or pickle with weights only), on the CPU.

    Unwraps `state_dict`, `model` and `student`, strips `module.` and `_orig_mod.`. Raises WeightsError (exit 3) for a
    file that is missing, cut short, not a checkpoint, or that would run code.
    """
    head = _head(path)
    length = int.from_bytes(head[:8], "little")  # of a safetensors header; in the other kinds a number beyond belief
    if head[8:9] == b"{" and length < 100_000_000:
        return _strip(_read_safetensors(path))
    if not head.startswith((b"PK", b"\x80")):
        raise WeightsError(f"{path} is not a checkpoint: it looks like {_looks(head)}", hint=_ANOTHER)
    return _strip(_unwrap(_read_torch(path), path))


_ANOTHER = "Name a .safetensors file or one written by torch.save(network.state_dict())."
_AGAIN = "Copy or download it again and compare its size and sha256 with the original's."


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, not a checkpoint", hint=_ANOTHER)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
        raise WeightsError(f"no checkpoint at {path}", hint=near or "Check the path.") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}", hint="Check its permissions.") from None
    if not head:
        raise WeightsError(f"{path} is empty", hint=_AGAIN)
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
        raise WeightsError(f"{path} is broken or cut short (safetensors: {error})", hint=_AGAIN) from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds; all mean that the file cannot be read
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and re.search(r"(?i)unsupported|not an allowed", text):
            what = re.search(r"GLOBAL ([\w.]+)", text)
            named = f" ({what.group(1)})" if what else ""
            raise WeightsError(
                f"{path} holds pickled code{named}, not only tensors; kdcli does not run it",
                hint="Where you trust it, save its state alone: torch.save(network.state_dict(), 'weights.pth').",
            ) from None
        line = (text.strip().splitlines() or [type(error).__name__])[0][:200]
        raise WeightsError(f"{path} is broken or cut short ({line})", hint=_AGAIN) from None


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(3):
        inner = next((found[k] for k in WRAPPERS if isinstance(found.get(k), Mapping)), None) if _is(found) else None
        if inner is None:
            break
        found = inner
    if not _is(found) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        held = ", ".join(map(str, list(found)[:5])) if _is(found) else type(found).__name__
        raise WeightsError(f"{path} holds no network's tensors (it holds {held or 'nothing'})", hint=_ANOTHER)
    return {str(k): v for k, v in found.items()}


def _is(found: Any) -> bool:
    return isinstance(found, Mapping)


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(2):  # DataParallel around a compiled network, or the other way round
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in state):
                state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def fill(module: nn.Module, state: Mapping[str, Tensor], *, arch: str, where: str) -> None:
    """Load every tensor of `state` into `module`, strictly; nothing is touched unless all of it fits.

    Zoo networks also take the names other repositories give their tensors (`kdcli.models.translate`). Raises
    WeightsError (exit 3) that says how many names matched and the first that did not, or that only the heads differ.
    """
    own = module.state_dict()
    given = _fit(arch, dict(state))
    shared = own.keys() & given.keys()
    shapes = sorted(k for k in shared if own[k].shape != given[k].shape)
    missing, extra = [k for k in own if k not in given], [k for k in given if k not in own]
    if missing and all(k.endswith("num_batches_tracked") for k in missing):  # saved before batch norm counted
        given |= {k: torch.zeros_like(own[k]) for k in missing}
        missing = []
    if shapes and not missing and not extra and _heads_only(shapes, own, given):
        has, wants = given[shapes[0]].shape[0], own[shapes[0]].shape[0]
        raise WeightsError(f"{where}: its head has {has} classes, {arch} here has {wants}", hint=_class_cure(arch))
    if missing or extra or shapes:
        wrong = [f"{k}: {list(given[k].shape)} in the file, {list(own[k].shape)} in the network" for k in shapes[:3]]
        wrong += [f"{k}: not in the file" for k in missing[:3]] + [f"{k}: not in the network" for k in extra[:3]]
        fit = len(shared) - len(shapes)
        raise WeightsError(
            f"{where} is not a checkpoint of {arch}: {fit} of the network's {len(own)} tensors match, the file has "
            f"{len(given)}. First differences: " + "; ".join(wrong[:4]),
            hint="Name the architecture that the file was trained with: ARCHITECTURE@PATH. `kdcli models` lists them.",
        )
    sick = [k for k, v in given.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if sick:
        raise WeightsError(
            f"{where}: {sick[0]} has values that are no numbers", hint="Its training diverged; use an earlier epoch."
        )
    ready: OrderedDict[str, Tensor] = OrderedDict(given)
    ready._metadata = getattr(own, "_metadata", {})  # pyright: ignore  # layout versions: mnasnet refuses without
    module.load_state_dict(ready, strict=True)


def digest(of: Mapping[str, Tensor] | nn.Module) -> str:
    """sha256 over the sorted names, dtypes, shapes and bytes of a state: the same weights, the same digest."""
    state: Mapping[str, Tensor] = of.state_dict() if isinstance(of, nn.Module) else of
    sha = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        sha.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def choose(
    name: ModelName,
    *,
    role: Literal["student", "mentor"],
    data_hash: str,
    num_classes: int,
    data_name: str,
    class_map: bool,
    runs_dir: Path = Path("runs"),
) -> Found:
    """Which weights a member of the classroom starts from (DESIGN section 3, "Names").

    `@path`, `@RUN`, `@RUN#epoch`, `@pretrained`, `@none`; left out, a student starts from scratch and a mentor takes
    the zoo's newest for this data set, else the library's pretrained weights when the class count fits. With
    `class_map` a mentor's class count may differ. Raises WeightsError (exit 3) with the cure.
    """
    asked = name.weights
    if role == "student" and asked in (None, "none"):
        return Found(None, "from scratch", None, None, False)
    if asked == "none":
        raise WeightsError(
            f"{name.typed}: a mentor without training teaches noise",
            hint=f"Leave out @none, or train it first: kdcli train --model {name.arch} --data {data_name}",
        )
    if asked == "pretrained" or names_weights(name):
        return _pretrained(name, role, num_classes, data_name, class_map)
    if asked is not None:
        found = _from_file(name, asked, runs_dir)
    else:
        card = cards.find(name.full, data_hash)
        if card is None:
            return _pretrained(name, role, num_classes, data_name, class_map)
        path = cards.weights_path(card)
        assert path is not None
        found = _carded(name, path, card, f"zoo: {card.line()}")
    if found.num_classes not in (None, num_classes) and not (class_map and role == "mentor"):
        raise WeightsError(
            f"{found.origin}: its head has {found.num_classes} classes, {data_name} has {num_classes}",
            hint=_class_cure(name.arch, data_name, role),
        )
    return found


def _pretrained(name: ModelName, role: str, num_classes: int, data_name: str, class_map: bool) -> Found:
    own = has_pretrained(name)
    train = f"kdcli train --model {name.arch if name.source == 'zoo' else name.full} --data {data_name}"
    asked = name.weights is not None
    if own is None:
        what = f"{name.full} has no pretrained weights" + ("" if asked else f", and the zoo none for {data_name}")
        here = [c for c in cards.cards() if cards.weights_path(c) and c.dataset == data_name]
        near = did_you_mean(name.arch, [c.architecture.rpartition(":")[2] for c in here]) if here and not asked else ""
        raise WeightsError(what, hint=f"Train it: {train}; or name a checkpoint: {name.arch}@PATH. {near}".strip())
    if role == "student":
        head = "" if own == num_classes else f", a fresh head for {num_classes} classes"
        return Found(None, f"{name.source}'s pretrained weights{head}", own or None, None, True)
    if own == num_classes or (class_map and own):
        return Found(None, f"{name.source}'s pretrained weights, {own} classes", own, None, True)
    head = f"know {own} classes" if own else "have no head"
    cures = [f"Train it on your data: {train}", f"or name a checkpoint: {name.arch}@PATH"]
    if own > num_classes:
        cures.append("or use the classes they share: --set classroom.class_map=auto")
    raise WeightsError(
        f"{name.full}: {name.source}'s pretrained weights {head}, {data_name} has {num_classes}", hint=", ".join(cures)
    )


def _from_file(name: ModelName, asked: str, runs_dir: Path) -> Found:
    path = Path(asked).expanduser()
    if path.is_file():
        told = path.with_suffix(".toml")
        card = cards.read_card(told) if path.suffix == ".safetensors" and told.is_file() else cards.identify(path)
        if card is None:
            state = load_state(path)
            return Found(state, str(path), _head_classes(name, state), None, False)
        return _carded(name, path, card, f"{path}: {card.line()}")
    run, _, epoch = asked.rpartition("#") if re.search(r"#\d+$", asked) else (asked, "", "")
    folder = next((f for f in (Path(run).expanduser(), runs_dir / run) if f.is_dir()), None)
    if folder is None:
        if path.suffix or path.parent != Path("."):
            load_state(path)  # says what is wrong with it
        runs = [p.name for p in runs_dir.glob("*") if p.is_dir()] if runs_dir.is_dir() else []
        raise WeightsError(
            f"{name.typed}: {asked!r} is neither a file nor a run in {runs_dir}",
            hint=did_you_mean(run, runs) or "`kdcli runs ls` lists the runs.",
        )
    return _from_run(name, folder, int(epoch) if epoch else None)


def _from_run(name: ModelName, folder: Path, epoch: int | None) -> Found:
    last = folder / "student.safetensors"
    path = last if epoch is None else folder / f"epoch-{epoch:03d}.safetensors"
    if not path.is_file():
        kept = sorted(int(p.stem.removeprefix("epoch-")) for p in folder.glob("epoch-*.safetensors"))
        if epoch is not None:
            have = f"It kept {', '.join(map(str, kept))}." if kept else "It kept none."
            raise WeightsError(
                f"run {folder} kept no epoch {epoch}", hint=f"{have} `kdcli train --keep {epoch}` keeps it."
            )
        raise WeightsError(
            f"run {folder} has no {last.name}: it has not finished",
            hint=f"`kdcli runs show {folder}` says how to continue it"
            + (f", or use an epoch it kept: @{folder}#{kept[-1]}" if kept else ""),
        )
    told = path.with_suffix(".toml")
    if told.is_file():
        card = cards.read_card(told)
        return _carded(name, path, card, f"run {folder.name}: {card.line()}")
    whole = last.with_suffix(".toml")
    card = None
    if whole.is_file():  # an epoch kept without a card of its own: the run's says all but score and hash
        card = cards.read_card(whole).model_copy(update={"epoch": epoch, "top1": None, "sha256": "", "file": path.name})
    if card is not None:
        return _carded(name, path, card, f"run {folder.name}: {card.line()}")
    state = load_state(path)
    return Found(state, f"run {folder.name}: {path.name}", _head_classes(name, state), None, False)


def _carded(name: ModelName, path: Path, card: Card, origin: str) -> Found:
    """Weights with a card: of this architecture, and the bytes the card was written for."""
    if not cards.same_architecture(name.full, card.architecture):
        right = card.architecture.removeprefix("zoo:")
        raise WeightsError(f"{path} is a {right}, not a {name.arch}", hint=f"Write {right}@{name.weights or path}")
    if card.sha256 and cards.file_hash(path) != card.sha256:
        raise WeightsError(
            f"{path} is not the file its card was written for (sha256 differs)",
            hint="`kdcli zoo verify` checks the zoo. Copy or train it again, or delete both files.",
        )
    return Found(load_state(path), origin, card.num_classes, card, False)


def _head_classes(name: ModelName, state: dict[str, Tensor]) -> int | None:
    """How many classes a checkpoint's head has, None when its tensors are not this architecture's.

    The head is what changes with the class count: of a network built, without memory, for a count that is no width.
    """
    odd = 1237
    try:
        with torch.device("meta"):
            own = create(name, odd).module.state_dict()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        own = create(name, odd).module.state_dict()
    given = _fit(name.arch, state)
    heads = {given[k].shape[0] for k, v in own.items() if v.ndim and v.shape[0] == odd and k in given and given[k].ndim}
    return heads.pop() if len(heads) == 1 else None


def _fit(arch: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state under the names that kdcli's networks use."""
    bare = arch.rpartition(":")[2]
    if bare.startswith("cifar_"):
        from kdcli.models.cifar import translate

        return translate(bare, state)
    if bare in ("googlenet", "inception_v3"):  # auxiliary heads, which kdcli's form of them leaves out
        return {k: v for k, v in state.items() if not k.startswith(("aux1.", "aux2.", "AuxLogits."))}
    return state


def _heads_only(keys: list[str], own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether the tensors differ in their first dimension alone, and all in the same two counts."""
    counts = {(own[k].shape[:1], given[k].shape[:1]) for k in keys}
    return len(counts) == 1 and all(own[k].shape[1:] == given[k].shape[1:] and own[k].ndim for k in keys)


def _class_cure(arch: str, data_name: str = "DATA", role: str = "mentor") -> str:
    cures = [f"Train one for these classes: kdcli train --model {arch} --data {data_name}"]
    if role == "mentor":
        cures.append("or map the classes: --set classroom.class_map=auto")
    return ", ".join(cures)
