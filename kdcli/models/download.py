"""Downloads of pretrained weights: bounded in time, and every failure one error with its cure."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kdcli.errors import WeightsError, first_line
from kdcli.models.net import ModelName

PATIENCE = 10.0  # seconds without a byte from the server before a download fails


@contextmanager
def downloading(name: ModelName, cache: str) -> Iterator[None]:
    """Raise WeightsError (exit 3) for whatever a download raises, and never wait without end.

    cache: the environment variable that names the library's cache folder.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"cannot get {name.full}'s pretrained weights: {type(error).__name__}: {first_line(error)}",
            hint=f"Check the network; or set {cache} to a folder that has them already; or name a checkpoint "
            f"({name.arch}@PATH); or train it (kdcli train --model {name.arch} --data DATA).",
        ) from error
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def hub_reached(hub_id: str | None, filename: str | None) -> Iterator[None]:
    """Contact the Hugging Face hub once before its client does: without a network the client retries for a minute.

    hub_id: `OWNER/NAME`, with `@REVISION` after it or not; None: nothing comes from the hub. A file in the hub's cache
    is read without contacting the hub.
    """
    if not hub_id:
        yield
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    repo, _, revision = hub_id.partition("@")
    files = [filename or "model.safetensors", "pytorch_model.bin"]
    cached = any(isinstance(try_to_load_from_cache(repo, f, revision=revision or None), str) for f in files)
    before: Any = constants.HF_HUB_OFFLINE
    try:
        if cached:
            constants.HF_HUB_OFFLINE = True
        else:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
