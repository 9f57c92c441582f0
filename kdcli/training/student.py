"""A trained network on disk: its weights with their card, written at the end of a run and read back."""

from torch import Tensor

from kdcli.data import DataSet
from kdcli.errors import WeightsError
from kdcli.models import cards, checkpoint, graduates
from kdcli.models.build import from_card
from kdcli.models.cards import Card
from kdcli.models.member import Member
from kdcli.system.sizes import plain
from kdcli.tasks import Score
from kdcli.training.run import Run


def save_student(
    run: Run,
    stem: str,
    member: Member,
    data: DataSet,
    *,
    task: str,
    epoch: int,
    score: dict[str, float],
    weights: dict[str, Tensor],
) -> None:
    """Write `weights` of `member` as RUN/`stem`.safetensors, with the card that describes them."""
    cards.save(run.path, stem, weights, card(member, data, task=task, epoch=epoch, score=score, origin=str(run.path)))


def card(
    member: Member, data: DataSet, *, task: str, epoch: int | None, score: Score | dict[str, float], origin: str
) -> Card:
    """The card that says what a trained network is and how it wants its input."""
    return Card(
        path=None,
        name=f"{member.name} on {data.name}",
        architecture=member.architecture.full,
        dataset=data.name,
        data_hash=data.hash,
        num_classes=len(data.classes),
        classes=data.classes,
        task=task,
        image_size=plain(member.input_size),  # pyright: ignore[reportArgumentType]
        mean=member.mean,
        std=member.std,
        interpolation=member.interpolation,
        score={name: round(value, 4) for name, value in score.items()},
        origin=origin,
        created=cards.stamp(),
        epoch=epoch,
        params=sum(p.numel() for p in member.net.parameters()),
        graduate=graduates.graduate_spec(member.net),
    )


def student_of(run: Run) -> Member:
    """A finished run's student. Raises WeightsError when it is not finished or its files are broken."""
    if not (run.path / "student.safetensors").is_file() or not (run.path / "student.toml").is_file():
        raise WeightsError(
            f"{run.path} has no student yet: it was stopped before its end",
            hint=f"`kdcli runs show {run.path}` says how to continue it.",
        )
    return from_card(
        cards.read_card(run.path / "student.toml"), checkpoint.load_state(run.path / "student.safetensors")
    )
