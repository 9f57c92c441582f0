"""The data sources, one entry each. Imports nothing heavy, since the command line reads it at start-up.

A new source is a module with `read` and `rows` (see `Module`) and an entry of `SOURCES`.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from kdcli.errors import RecipeError, did_you_mean
from kdcli.recipe import DataConfig
from kdcli.system.paths import data_root

if TYPE_CHECKING:
    from kdcli.data.arrays import Arrays
    from kdcli.data.parts import Listed

Notes = list[tuple[str, object, str]]
"""(recipe key, value, why) of each setting that was chosen for the user."""


class Module(Protocol):
    """The module of a source."""

    def read(self, config: DataConfig, notes: Notes) -> "Arrays | Listed":
        """The data, either in memory or as a list of files. Raises DataError for what is missing or broken."""
        ...

    def rows(self, kind: str, root: Path) -> list[dict[str, Any]]:
        """The source's data sets in a data root, as `available` lists them. Opens as little as possible."""
        ...


@dataclass(frozen=True)
class Source:
    """What `data.name` begins with, and how that data is found, read and trained on."""

    usage: str  # as --data takes it: `digits`, `imagenet[:DIR]`, `folder:DIR`
    image_size: int | None  # default in pixels, square; None: from the data
    augment: str  # default preset
    recipe: str  # training settings where no recipe is given; empty: those of what was packed
    module: str
    layout: str = ""  # what it consists of, for messages; {where} is the path that was looked at
    several: str = ""  # how it holds several classes an image; empty: it cannot

    @property
    def takes_path(self) -> bool:
        return ":" in self.usage

    @property
    def needs_path(self) -> bool:
        return self.takes_path and "[" not in self.usage

    def load(self) -> Module:
        """The source's module, imported when needed."""
        return cast(Module, import_module(f"kdcli.data.{self.module}"))


FOLDER = (
    "Lay it out as {where}/train/<class>/*.jpg and {where}/val/<class>/*.jpg, "
    "for ImageNet with WordNet ids (n01440764) as classes"
)
LABELS = "DIR/labels.csv with the columns file,labels (several labels separated by ;)"
NPZ = (
    "An .npz holds train_images [N,H,W] or [N,H,W,3] (uint8, or float for distilled sets), train_labels [N] or [N,1] "
    "(class numbers) or [N,K] (0/1, classes of each image), the same for test_ (or val_), and optionally class_names."
)
SOURCES: dict[str, Source] = {
    "digits": Source("digits", 16, "crop", "defaults/digits", "digits"),
    "cifar10": Source("cifar10", 32, "crop-flip", "defaults/cifar", "cifar"),
    "cifar100": Source("cifar100", 32, "crop-flip", "defaults/cifar", "cifar"),
    "imagenet": Source("imagenet[:DIR]", 224, "imagenet", "defaults/imagenet", "folder", FOLDER),
    "folder": Source(
        "folder:DIR", 224, "imagenet", "defaults/folder", "folder",
        f"{FOLDER}; or one folder a class; or any images with {{where}}/labels.csv", LABELS,
    ),
    "pack": Source(
        "pack:FILE", 224, "imagenet", "", "pack", "`kdcli data pack --data folder:DIR` writes one",
        "a pack of a folder with labels.csv",
    ),
    "npz": Source("npz:FILE", None, "crop-flip", "defaults/npz", "npz", NPZ, "train_labels as a 0/1 matrix [N, K]"),
}  # fmt: skip
"""Every data source by what stands before the colon of `data.name`."""

USAGES = tuple(source.usage for source in SOURCES.values())
HELP = f"{', '.join(USAGES[:-1])} or {USAGES[-1]}."
"""The sources as a help text lists them."""


def parse(name: str | None) -> tuple[str, str]:
    """`folder:pets` as its source and path; the path may be empty where the source needs none.

    Raises RecipeError for a name that is not set, unknown or incomplete.
    """
    if not name:
        raise RecipeError("data.name is not set", hint=f"--data NAME, one of {HELP}")
    kind, _, where = name.partition(":")
    source = SOURCES.get(kind)
    if source is None or (where and not source.takes_path):
        hint = f"{did_you_mean(name, USAGES)} Your own images are folder:DIR.".strip()
        raise RecipeError(f"data.name = {name!r}: no such data set", hint=hint)
    if source.needs_path and not where:
        raise RecipeError(
            f"data.name = {name!r}: the path is missing",
            hint=f"--data {source.usage}. {source.layout.format(where='DIR')}",
        )
    return kind, where


def recipe_for(name: str, root: str | None = None) -> str:
    """The built-in recipe with training settings for a data set; for a pack that of what was packed.

    Raises RecipeError as `parse`, DataError for a pack that cannot be read.
    """
    kind, where = parse(name)
    source = SOURCES[kind]
    if not source.recipe:  # whatever was packed decides
        source = SOURCES[cast(Any, source.load()).facts(find(root, where))["kind"]]
    return source.recipe


def packable(name: str) -> bool:
    """Whether a data set is a folder of image files."""
    return SOURCES[parse(name)[0]].module == "folder"


def find(root: str | None, where: str) -> Path:
    """A path as given where it exists (or is absolute), else in the data root."""
    given = Path(where).expanduser()
    inside = data_root(root) / given
    return inside if not given.exists() and inside.exists() else given


def row(name: str, where: str | Path, images: int | None, classes: int | None, present: bool = True) -> dict[str, Any]:
    """One data set as `kdcli data ls` lists it; counts are None where unknown."""
    return {"name": name, "where": str(where), "images": images, "classes": classes, "present": present}
