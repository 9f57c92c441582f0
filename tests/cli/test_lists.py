"""recipes, models, data, zoo, runs and doctor: what they print, as a table and as JSON."""

from pathlib import Path

import pytest
from cli_kit import CLASSROOM, PEER, TINY, add_mentors, kdcli, picture_folder

from kdcli import recipe as recipes
from kdcli.models import cards


def test_recipes_ls_lists_every_built_in_one():
    said = kdcli("recipes", "ls")
    assert all(name in said.out for name in recipes.names())
    assert said.next.startswith("kdcli recipes cat ")
    assert [one["name"] for one in kdcli("recipes", "ls", "--json").json] == recipes.names()
    assert {one["name"].split("/")[0] for one in kdcli("recipes", "ls", "cifar100", "--json").json} == {"cifar100"}


def test_recipes_ls_prints_the_published_figure_of_the_recipes_own_method():
    row = next(line for line in kdcli("recipes", "ls", "r110-r20").out.splitlines() if "cifar100/r110-r20" in line)
    published = recipes.load("cifar100/r110-r20").expect.of("top1")["classroom"]
    assert row.rstrip().endswith(f"{published:.2f}")


def test_recipes_cat_prints_the_file_or_the_whole():
    assert kdcli("recipes", "cat", "quickstart").out == recipes.find("quickstart").read_text(encoding="utf-8")
    assert "extends" not in kdcli("recipes", "cat", "cifar100/r56-r20", "--whole").out
    data = kdcli("recipes", "cat", "quickstart", "--json").json
    assert data["classroom"]["student"] == recipes.load("quickstart").classroom.student


def test_recipes_cp_writes_a_recipe_that_means_the_same_and_never_overwrites(here):
    said = kdcli("recipes", "cp", "cifar100/r110-r20", "mine.toml")
    assert said.next == "kdcli check --recipe mine.toml"
    assert recipes.load("mine.toml").hash() == recipes.load("cifar100/r110-r20").hash()
    assert "exists" in kdcli("recipes", "cp", "quickstart", "mine.toml", code=2).err
    kdcli("recipes", "cp", "cifar100/r110-r20")
    assert (here / "r110-r20.toml").is_file()


def test_models_searches_all_three_sources():
    said = kdcli("models", "resnet18")
    assert {"cifar_resnet18", "torchvision", "pretrained"} <= set(said.out.split())
    found = kdcli("models", "cifar_resnet20", "--classes", "100", "--image-size", "32", "--json").json
    assert {"name": "cifar_resnet20", "source": "zoo", "params": 278324}.items() <= found[0].items()
    assert all(
        one["source"] == "torchvision" for one in kdcli("models", "vgg", "--source", "torchvision", "--json").json
    )
    assert "more; --limit" in kdcli("models", "cifar_*", "--limit", "1").out


def test_models_shows_what_the_zoo_has_trained():
    add_mentors(PEER)
    assert kdcli("models", PEER, "--json").json[0]["zoo"] == ["digits"]


def test_data_ls_lists_what_is_in_the_data_root(here):
    picture_folder(here / "root" / "pets", ("cat", "dog"), train=2, val=1)
    said = kdcli("data", "ls", "--data-root", here / "root")
    assert "folder:pets" in said.out
    found = {one["name"]: one for one in kdcli("data", "ls", "--data-root", "root", "--json").json}
    assert found["digits"]["present"]
    assert not found["cifar10"]["present"]
    assert (found["folder:pets"]["images"], found["folder:pets"]["classes"]) == (6, 2)


def test_zoo_ls_shows_own_and_shipped_cards_and_verify_finds_a_changed_file():
    add_mentors(PEER)
    own = next(one for one in kdcli("zoo", "ls", "--json").json if one["dataset"] == "digits")
    assert own["architecture"] == f"zoo:{PEER}"
    assert Path(own["weights"]).is_file()
    listed = kdcli("zoo", "ls").out
    assert "card only" in listed
    assert "BSD-2-Clause" in listed
    assert " ok " in kdcli("zoo", "verify").out
    with open(own["weights"], "ab") as file:
        file.write(b"!")
    said = kdcli("zoo", "verify", code=3)
    assert "changed" in said.out
    assert "kdcli train" in said.err
    assert kdcli("zoo", "verify", "--json", code=3).json[0]["state"] == "changed"


def test_zoo_add_takes_a_checkpoint_file_and_scores_it_first(here):
    import torch

    from kdcli.models import registry

    module = registry.create(registry.resolve(PEER), 10).module
    torch.save(module.state_dict(), here / "net.pth")
    needed = kdcli("zoo", "add", "net.pth", code=2)
    assert "--architecture" in needed.err
    said = kdcli("zoo", "add", "net.pth", "--architecture", PEER, "--data", "digits", "--licence", "MIT", "--json").json
    assert said["licence"] == "MIT"
    assert 0 <= said["top1"] <= 100
    assert cards.find(PEER, said["data_hash"]).sha256 == said["sha256"]


def test_runs_are_listed_shown_and_removed(here, monkeypatch):
    assert kdcli("runs", "ls").next == "kdcli quickstart"
    assert kdcli("runs", "ls", "--json").json == []
    add_mentors("cifar_resnet14", PEER)
    kdcli("distill", *CLASSROOM, *TINY, "--out", "runs/mine")
    said = kdcli("runs", "ls")
    assert "mine" in said.out
    assert said.next == "kdcli runs show mine"
    row = kdcli("runs", "ls", "--json").json[0]
    assert {"run": "mine", "kind": "distill", "method": "classroom", "finished": True}.items() <= row.items()
    shown = kdcli("runs", "show")
    assert shown.next == "kdcli export --onnx runs/mine"
    assert all(word in shown.out for word in ("mentor cifar_resnet14", "temperature/cifar_resnet8", "done"))
    facts = kdcli("runs", "show", "mine", "--json").json
    assert facts["metrics"][-1]["epoch"] == 1
    assert facts["provenance"]["mentors"].keys() == {"cifar_resnet14", PEER}
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115  nobody there to answer
    assert kdcli("runs", "rm", "mine", code=130).err.strip().endswith("interrupted")
    assert (here / "runs/mine").is_dir()
    kdcli("runs", "rm", "mine", "--yes")
    assert not (here / "runs/mine").exists()


def test_doctor_says_what_is_here_without_a_test():
    found = kdcli("doctor", "--no-test", "--json").json
    assert found.keys() == {"versions", "devices", "folders"}
    assert found["folders"]["recipes"] == len(recipes.names())
    assert kdcli("doctor", "--no-test").next == "kdcli quickstart"


def test_doctors_self_test_trains_exports_and_checks(monkeypatch):
    assert kdcli("doctor", "--json").json["self-test"]["result"] == "passed"
    from kdcli.export import onnx

    monkeypatch.setattr(onnx, "export_onnx", lambda *a, **k: 1 / 0)
    said = kdcli("doctor", "--json", code=1)
    assert said.json["self-test"]["while"].startswith("exporting")
    assert "self-test failed" in said.err


def test_help_of_a_group_without_a_command_is_its_help():
    said = kdcli("zoo", code=None)
    assert said.code in (0, 2)
    assert all(name in said.out + said.err for name in ("ls", "add", "verify"))


@pytest.mark.parametrize("command", [("recipes", "ls", "zzz"), ("models", "zzz")])
def test_a_search_without_a_hit_says_so(command):
    assert "'zzz'" in kdcli(*command, code=2).err
