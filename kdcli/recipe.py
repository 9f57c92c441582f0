"""The recipe: a TOML file with every setting of a run, checked strictly; extended and overridden by key.

The file is long because all keys are in one place.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kdcli.errors import RecipeError, did_you_mean
from kdcli.system import user_code
from kdcli.system.paths import shipped

Precision = Literal["auto", "fp32", "bf16", "fp16"]
STAGE = "@stage:"
"""Prefix of a stage's graduate, `@stage:NAME`, wherever a network is named."""
NAMED = ("student", "teacher", "peers")
REMOVED = {
    "classroom.bank_top": "--set data.views=8 limits a bank's size; --set classroom.bank=false runs without one.",
    "data.readers": "Images are decoded by threads; data.workers says how many.",
    "data.decode": "Images are decoded on the CPU.",
}
"""Keys of earlier versions, with what to use instead."""
OLD_DEFAULTS = {"data.readers": "auto", "data.decode": "cpu"}
"""Values of removed keys that the run folders of earlier versions hold; ignored, since they change nothing."""


class Section(BaseModel):
    """A table of the recipe; a key it does not have is an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, at what size, how augmented, in which order."""

    name: str | None = None  # kdcli/data/sources.py lists them: digits | cifar100 | imagenet[:DIR] | folder:DIR | ...
    root: str | None = None  # where downloads and bare names are looked for; default KDCLI_DATA, then KDCLI_HOME/data
    image_size: int | tuple[int, int] | None = None  # pixels of a square, or [height, width]; default the data set's
    augment: str = "auto"  # a preset's name; auto: the data set's own
    views: int | None = Field(default=None, ge=1)  # limit each image to this many views, so that a bank can hold them
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)  # share of the training set kept for choosing an epoch
    per_class: int | None = Field(default=None, ge=1)  # use only this many training images of every class
    seed: int = Field(default=0, ge=0)  # order and views
    workers: int | None = Field(default=None, ge=0)  # decoding threads; 0: the main thread; default: by the machine
    skip_corrupt: bool = False

    @field_validator("image_size", mode="before")
    @classmethod
    def _one_or_two_sides(cls, value: Any) -> Any:
        """A square as one number, even if given as [32, 32], so that one size has one recipe hash."""
        if value is None:
            return None
        sides = value if isinstance(value, list | tuple) else (value, value)
        numbers = [type(side) in (int, float) and side == int(side) for side in sides]
        if len(sides) != 2 or not all(numbers) or not all(8 <= side <= 1024 for side in sides):
            raise ValueError("a number of pixels from 8 to 1024, or two of them as [height, width]")
        height, width = map(int, sides)
        return height if height == width else (height, width)


class ClassroomConfig(Section):
    """The student and its mentors, each by name, and how the mentors run."""

    student: str | None = None
    teacher: str | None = None
    peers: list[str] = []
    class_map: Literal["off", "auto"] | dict[str, str | int] = "off"  # data class -> mentor's class
    precision: Precision = "auto"  # of the mentors
    compile: bool | None = None  # torch.compile the mentors; default: those for which compile time pays back
    ahead: int | None = Field(default=None, ge=1)  # batches in one look-ahead; default: the fastest by measurement
    bank: bool = False  # cache the mentors' outputs on disk, rounded to float16
    bank_pooled: bool = False  # cache their penultimate vectors too


class MethodConfig(BaseModel):
    """The method's name; every other key is an argument of its constructor and checked there."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)
    name: str = "classroom"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """A short name that is safe in paths; for a user's own method its class's name."""
        return user_code.label(self.name)


class TrainConfig(Section):
    """How the student learns; the defaults are the CIFAR recipe of papers.md section 5."""

    epochs: int = Field(default=240, ge=1)
    batch_size: int = Field(default=64, ge=1)  # images per update, over all ranks and micro-batches
    drop_last: bool = False
    optimizer: str = "sgd"  # any timm optimiser; sgd follows `nesterov`
    lr: float = Field(default=0.05, ge=0.0)
    momentum: float = Field(default=0.9, ge=0.0)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0.0)
    decay_norm_and_bias: bool = True  # the papers decay every parameter; timm's default is false
    schedule: str = "cosine"  # crd | classroom | constant | any timm schedule
    warmup_epochs: int = Field(default=0, ge=0)
    warmup_lr: float = Field(default=1e-5, ge=0.0)
    min_lr: float = Field(default=0.0, ge=0.0)
    decay_epochs: list[int] = []  # milestones of schedule = "multistep"; the period of "step" is the first
    decay_rate: float = Field(default=0.1, gt=0.0)
    cycles: int = Field(default=1, ge=1)  # schedule = "cosine" falls from lr this many times (warm restarts)
    precision: Precision = "auto"  # of the student; losses are float32
    seed: int = Field(default=0, ge=0)  # initial weights, method noise, dropout
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)  # decay of the weights' moving average, which ships
    accumulate: int = Field(default=1, ge=1)  # micro-batches per update
    clip_grad: float | None = Field(default=None, gt=0.0)  # largest gradient norm
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    mixup: float = Field(default=0.0, ge=0.0)
    cutmix: float = Field(default=0.0, ge=0.0)
    sync_bn: bool = False  # batch norms over all GPUs' images; else each GPU normalises by its own share of a batch
    compile: bool = False  # torch.compile the student
    cuda_graph: bool = False  # capture the whole step as CUDA graphs; refused where steps differ
    tensorboard: bool = False  # also write the metrics for TensorBoard (an extra: pip install "kdcli[tensorboard]")
    eval_every: int = Field(default=1, ge=1)  # epochs between scores; the last is always scored
    checkpoint_minutes: float = Field(default=10.0, gt=0.0)  # also within an epoch; every epoch ends with one anyway

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide batch_size = {self.batch_size}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair images, so batch_size = {self.batch_size} must be even")
        return self


class Expect(Section):
    """Published figures to print next to the measured ones: one table per metric, method -> value."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, dict[str, float]]

    source: str = ""
    epoch: Literal["best", "last"] = "last"
    tolerance: float = 0.5  # percentage points

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """metric -> method -> value."""
        return self.__pydantic_extra__

    def of(self, metric: str) -> dict[str, float]:
        """The published figures of a metric, by method."""
        return self.figures.get(metric, {})


class StageConfig(Section):
    """A training before the recipe's own. Later stages and the recipe's classroom name its graduate `@stage:NAME`.

    Keys left out have the recipe's values; `train` holds only those that differ.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # also the folder's name
    student: str
    teacher: str | None = None
    peers: list[str] | None = None
    method: MethodConfig | None = None
    train: dict[str, Any] = {}


class Recipe(Section):
    """Everything a run needs."""

    title: str = ""
    source: str = ""
    task: Literal["classify", "multilabel"] = "classify"
    data: DataConfig = DataConfig()
    classroom: ClassroomConfig = ClassroomConfig()
    method: MethodConfig = MethodConfig()
    # method -> its options when it runs in place of the recipe's method; if they include a `name`, the key is a label,
    # so that one method can be compared in several forms: tekap-l = { name = "tekap", parts = "logits" }
    baselines: dict[str, dict[str, Any]] = {}
    train: TrainConfig = TrainConfig()
    expect: Expect | None = None
    stage: list[StageConfig] = []  # trained first, in this order

    def hash(self) -> str:
        """sha256 of what decides the result: without titles, published figures, other methods' options, when to save,
        and decoding threads. A user's own method enters by its file's content, not by its path."""
        idle: dict[str, Any] = {"title": True, "source": True, "expect": True, "baselines": True}
        idle |= {"train": {"checkpoint_minutes"}, "data": {"workers"}}
        plain = self.model_dump(mode="json", exclude=idle | ({} if self.stage else {"stage": True}))
        plain["method"] = _floats(plain["method"])  # not typed yet, and tau = 4 must equal tau = 4.0
        if user_code.named(self.method.name):
            plain["method"]["name"] = f"{user_code.digest(self.method.name)}:{self.method.label}"
        for one in plain.get("stage", []):
            one |= {"method": _floats(one["method"]), "train": _floats(one["train"])}
            if one["method"] and user_code.named(name := one["method"]["name"]):
                one["method"]["name"] = f"{user_code.digest(name)}:{user_code.label(name)}"
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def toml(self) -> str:
        """The whole recipe as TOML, defaults written out; what is unset is left out."""
        without: set[str] = set() if self.stage else {"stage"}
        return tomlkit.dumps(self.model_dump(mode="json", exclude_none=True, exclude=without))

    def stages(self, where: str = "recipe") -> dict[str, "Recipe"]:
        """Every stage by name as a recipe of its own, in order."""
        out = {}
        for one in self.stage:
            idle = {"title", "source", "baselines", "expect", "stage"}
            named = {key: x for key in NAMED if (x := getattr(one, key)) is not None}
            tables = merge(self.model_dump(exclude_none=True, exclude=idle), {"classroom": named, "train": one.train})
            if one.method:
                tables["method"] = one.method.model_dump()
            out[one.name] = from_dict(tables, f"{where}: stage {one.name}")
        return out

    def own_methods(self) -> dict[str, str]:
        """{label: `file.py:Class`} of the user's own methods that the recipe names."""
        names = [self.method.name, *self.baselines, *(str(one.get("name", "")) for one in self.baselines.values())]
        names += [one.method.name for one in self.stage if one.method]
        return {user_code.label(name): name for name in reversed(names) if user_code.named(name)}

    def to_keep(self) -> "Recipe":
        """A copy for a run's folder, which holds the user's methods in files named after their classes."""
        tables = self.model_dump(exclude_none=True)
        rename = {name: f"{label}.py:{label}" for label, name in self.own_methods().items()}
        tables["method"]["name"] = rename.get(self.method.name, self.method.name)
        for one in tables["stage"]:
            if "method" in one:
                one["method"]["name"] = rename.get(one["method"]["name"], one["method"]["name"])
        for options in tables["baselines"].values():
            options |= {"name": rename.get(options["name"], options["name"])} if "name" in options else {}
        tables["baselines"] = {rename.get(name, name): options for name, options in tables["baselines"].items()}
        return from_dict(tables, "recipe")

    def with_method(self, name: str) -> "Recipe":
        """A copy that runs another method on the same classroom, with the options `baselines` gives it.

        A label of `baselines` runs the method that it names, with its options. If that is the recipe's own method, the
        recipe's other options stay.
        """
        if name == self.method.name:
            return self
        other = self.with_(method={"name": name, **self.baselines.get(name, {})})
        if other.expect and other.method.name != name:  # figures under the method's name are of another form
            for figures in other.expect.figures.values():
                figures.pop(other.method.name, None)
                if name in figures:
                    figures[other.method.name] = figures.pop(name)
        return other

    def with_(self, **overrides: Any) -> "Recipe":
        """A copy with dotted keys replaced: `recipe.with_(**{"train.seed": 2})`."""
        return from_dict(merge(self.model_dump(exclude_none=True), _nest(overrides)), "recipe")


def _floats(value: Any) -> Any:
    """`value` with all integers in it, also in nested tables, as floats."""
    if isinstance(value, dict):
        return {key: _floats(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_floats(one) for one in value]
    return float(value) if type(value) is int else value


def load(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe by path or built-in name, follow `extends`, apply dotted-key `overrides`.

    Raises RecipeError naming the file, the key and the nearest allowed name.
    """
    return from_dict(merge(read(name), _nest(overrides or {})), name)


def read(name: str, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's tables with everything it extends merged in (its own keys win)."""
    path = find(name, extended_by=_seen[-1] if _seen else None)
    if path in _seen:
        chain = " -> ".join(str(p) for p in (*_seen, path))
        raise RecipeError(f"recipes extend each other in a cycle: {chain}", hint="Remove one `extends` line.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a byte-order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}", hint="`kdcli recipes cat quickstart` shows one.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="Check the file's permissions.") from None
    base = tables.pop("extends", None)
    tables = _without_old_defaults(tables)
    _check_keys(tables, str(path))
    tables = located(tables, path.parent)
    if base is None:
        return tables
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends: one recipe's name or path, not {base!r}", hint='extends = "cifar100/base"')
    return merge(read(base, (*_seen, path)), tables)


def located(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's tables with absolute paths of own methods, looked up in `folder`, then in the current directory."""
    method, others, first = tables.get("method"), tables.get("baselines"), tables.get("stage")
    if isinstance(first, list):
        tables = {**tables, "stage": [located(one, folder) if isinstance(one, dict) else one for one in first]}
    if isinstance(method, dict) and isinstance(method.get("name"), str):
        tables = {**tables, "method": {**method, "name": user_code.resolve(method["name"], folder)}}
    if isinstance(others, dict):
        tables = {**tables, "baselines": {user_code.resolve(name, folder): one for name, one in others.items()}}
        for label, options in tables["baselines"].items():
            if isinstance(options, dict) and isinstance(options.get("name"), str):
                tables["baselines"][label] = {**options, "name": user_code.resolve(options["name"], folder)}
    return tables


def find(name: str, extended_by: Path | None = None) -> Path:
    """The file of a recipe: a path (relative to the `extended_by` recipe or the current directory) or a built-in name.

    A recipe never extends itself: a user's own `quickstart.toml` may extend the built-in `quickstart`.
    """
    tries = [Path(name)] if Path(name).suffix == ".toml" else []
    if extended_by is not None:
        tries = [extended_by.parent / name, extended_by.parent / f"{name}.toml", *tries]
    tries += [shipped("recipes") / f"{name}.toml", shipped("recipes") / name]
    hits = [path.resolve() for path in tries if path.suffix == ".toml" and path.is_file()]  # not recipes/RESULTS.md
    if hits:
        return next((path for path in hits if path != extended_by), hits[0])
    known = names()
    raise RecipeError(
        f"no recipe called {name!r}, neither a file nor a built-in name",
        hint=f"{did_you_mean(name, known)} `kdcli recipes ls` lists the built-in ones.".strip(),
    )


def names() -> list[str]:
    """The built-in recipes' names, like `cifar100/r110-r20`."""
    folder = shipped("recipes")
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.toml"))


def parse_set(pairs: list[str]) -> dict[str, Any]:
    """`["method.tau=4", "train.schedule=crd"]` as dotted keys and values; a value is TOML, else a string."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {pair}: not key=value", hint="For example: --set method.tau=4")
        try:
            out[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            out[key.strip()] = text.strip()
    return out


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables merged key by key, `over` winning; a [method] of another name replaces the whole table."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        both_tables = isinstance(old, dict) and isinstance(value, dict)
        if both_tables and key == "method" and _method(value, _method(old)) != _method(old):
            out[key] = value  # another method's options mean nothing to this one
        elif both_tables and key != "class_map":
            out[key] = merge(old, value)  # pyright: ignore[reportArgumentType]
        else:
            out[key] = value
    return out


def _method(table: Any, otherwise: str = MethodConfig.model_fields["name"].default) -> Any:
    return table.get("name", otherwise)


def from_dict(tables: dict[str, Any], where: str) -> Recipe:
    """A checked Recipe. Raises RecipeError that says `where: key`, what was wrong and the nearest allowed name."""
    try:
        recipe = Recipe.model_validate(_without_old_defaults(tables))
    except ValidationError as error:
        raise _explained(error, tables, where) from None
    _check_stages(recipe, where)
    return recipe


def _explained(error: ValidationError, tables: dict[str, Any], where: str) -> RecipeError:
    """pydantic's findings in one message; an unknown key alone, with the nearest known one."""
    lines = []
    for problem in error.errors():
        loc = [part for part in problem["loc"] if not str(part).startswith(("literal[", "dict[", "function-"))]
        key, section = ".".join(map(str, loc)), _section(loc[:-1])
        unknown = section is not None and loc[-1] not in section.model_fields and problem["type"] != "missing"
        if section and unknown and (section is not Expect or not isinstance(problem["input"], dict)):
            if cure := REMOVED.get(key):
                return RecipeError(f"{where}: {key} was removed", hint=cure)
            if loc[0] == "stage" and len(loc) > 1 and isinstance(one := tables["stage"][loc[1]], dict):
                key = ".".join(map(str, ["stage", one.get("name", loc[1]), *loc[2:]]))
            known = section.model_fields
            hint = did_you_mean(str(loc[-1]), known) or f"Allowed: {', '.join(known)}."
            return RecipeError(f"{where}: {key}: no such key", hint=hint)
        value = problem.get("input")  # for a check of a whole table: the table, too long to print
        given = "" if isinstance(value, dict) else f" (given {value!r})"
        lines.append(f"{where}: {key}: {problem['msg']}{given}")
    return RecipeError("\n".join(dict.fromkeys(lines)), hint="`kdcli recipes cat quickstart` shows every table.")


def _section(loc: list[Any]) -> type[BaseModel] | None:
    """The model of the table at `loc`; None if there is no table or its keys are free."""
    if not loc:
        return Recipe
    if len(loc) == 1:
        model = {"expect": Expect}.get(loc[0]) or getattr(Recipe.model_fields.get(loc[0]), "annotation", None)
        return model if isinstance(model, type) and issubclass(model, Section) else None
    return StageConfig if loc[0] == "stage" and len(loc) == 2 else None


def _check_keys(tables: dict[str, Any], where: str) -> None:
    """Raise RecipeError for unknown keys of one file before its base is merged in, so that the error names the file."""
    try:
        Recipe.model_validate(tables)
    except ValidationError as error:
        explained = _explained(error, tables, where)
        if explained.message.endswith(("no such key", "was removed")):
            raise explained from None


def _without_old_defaults(tables: dict[str, Any]) -> dict[str, Any]:
    out = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    for dotted, value in OLD_DEFAULTS.items():
        name, key = dotted.split(".")
        if isinstance(table := out.get(name), dict) and table.get(key) == value:
            del table[key]
    return out


def staged(config: ClassroomConfig, *, mentors: bool = True) -> list[str]:
    """The stages whose graduates a classroom names, as its student and, with `mentors`, as its mentors."""
    specs = [config.student, *((config.teacher, *config.peers) if mentors else ())]
    return [spec.removeprefix(STAGE) for spec in specs if spec and spec.startswith(STAGE)]


def _check_stages(recipe: Recipe, where: str) -> None:
    """Raise RecipeError for two stages with one name, and for a `@stage:NAME` that does not come before its use."""
    known: list[str] = []
    for name, one in [*recipe.stages(where).items(), ("", recipe)] if recipe.stage else []:
        here = f"{where}: stage {name}" if name else where
        for wanted in staged(one.classroom):
            if wanted not in known:
                raise RecipeError(
                    f"{here}: {STAGE}{wanted}: no stage of that name comes before it",
                    hint=did_you_mean(wanted, known) or "What a stage leaves out (peers too) is the recipe's own.",
                )
        known.append(name)
    if len(recipe.stage) > len({one.name for one in recipe.stage}):
        raise RecipeError(f"{where}: two stages have the same name", hint="Each [[stage]] needs a name of its own.")


def _nest(dotted: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        *tables, last = key.split(".")
        here = out
        for table in tables:
            here = here.setdefault(table, {})
            if not isinstance(here, dict):
                raise RecipeError(
                    f"{key}: {table} is given both a value and keys of its own", hint="Leave one of them out."
                )
        here[last] = value
    return out
