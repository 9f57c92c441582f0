"""The dictionary of data sources: complete, read by every command, and light to import."""

import subprocess
import sys

import pytest

from kdcli import recipe
from kdcli.data import sources
from kdcli.data.sources import SOURCES
from kdcli.data.views import AUGMENTS
from kdcli.errors import RecipeError


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_is_complete(kind, tmp_path):
    source = SOURCES[kind]
    module = source.load()
    assert callable(module.read)
    assert isinstance(module.rows(kind, tmp_path), list)
    assert source.augment in AUGMENTS
    assert source.usage.partition(":")[0].partition("[")[0] == kind
    assert bool(source.layout.format(where="x")) == source.takes_path
    if source.recipe:
        start = recipe.load(source.recipe)
        assert start.data.augment in ("auto", source.augment)
        assert start.data.image_size in (None, source.image_size)


def test_names_are_parsed():
    assert sources.parse("digits") == ("digits", "")
    assert sources.parse("imagenet") == ("imagenet", "")
    assert sources.parse("imagenet:a:b") == ("imagenet", "a:b")
    assert sources.recipe_for("cifar10") == "defaults/cifar"
    assert [kind for kind in SOURCES if sources.packable(f"{kind}:x" if SOURCES[kind].takes_path else kind)] == [
        "imagenet",
        "folder",
    ]
    for name in ("folder", "pack:", "digits:x", "digit", "", None):
        with pytest.raises(RecipeError) as caught:
            sources.parse(name)
        assert caught.value.hint


def test_it_is_read_without_torch():
    code = "import sys, kdcli.data.sources; assert not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there():
    import kdcli.data

    with pytest.raises(AttributeError, match="nothing_of_ours"):
        kdcli.data.nothing_of_ours  # noqa: B018
