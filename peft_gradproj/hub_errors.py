"""What went wrong between us and the Hub, as one `HubError` that says what, where and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import GradProjError, HubError
from .untrusted import printable

__all__ = ["hub_errors"]

_ADVICE = {
    400: "Mend what it complains of and try again.",
    401: "Log in with `hf auth login`, or give a token; check the name if the repository is somebody else's.",
    403: "Use a token that may do this: one with write access to publish, or one that was granted access to read.",
    404: "Check the name and the revision; a private repository needs a token that may read it.",
    409: "Another operation on the repository is under way, or the name is taken; try again in a moment.",
    412: "Somebody else committed meanwhile; look at what changed and publish again.",
    413: "A file is too large for the Hub.",
    429: "Wait and try again.",
}


@contextmanager
def hub_errors(repo_id: str, doing: str, *, consequence: str = "", unsure: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub's client into a `HubError`.

    Args:
        repo_id: The repository.
        doing: What is being done, as in 'uploading to'.
        consequence: What it means for the repository that this failed.
        unsure: What it means where the answer was lost; `consequence` if `None`.

    Raises:
        HubError: If the Hub refuses, cannot be reached, or answers what cannot be understood.
    """
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except GradProjError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        fault = _fault(_root(error))
        meaning = unsure if unsure is not None and fault.is_lost else consequence
        parts = (f"{fault.what} while {doing} {repo_id}.", meaning, fault.advice)
        raise HubError(" ".join(part for part in parts if part)) from error


@dataclass(frozen=True)
class _Fault:
    what: str
    advice: str
    is_lost: bool = False
    """Whether the Hub may have done what was asked."""


def _root(error: Exception) -> Exception:
    """What is behind the client's complaint that an upload failed, or that a file is not in its cache either."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__
    return (
        cause if isinstance(error, LocalEntryNotFoundError | RuntimeError) and isinstance(cause, Exception) else error
    )


def _fault(error: Exception) -> _Fault:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    response = getattr(error, "response", None)
    if response is not None:
        return _refusal(int(response.status_code), response.headers, getattr(error, "server_message", None) or "")
    detail = f"{type(error).__name__}: {_first_line(str(error))}"
    if isinstance(error, OfflineModeIsEnabled):
        return _Fault("offline mode is on", "Unset HF_HUB_OFFLINE and try again.")
    if isinstance(error, HTTPError | OSError):
        what = f"the connection was lost, or never made ({detail})"
        return _Fault(what, "Check the network and try again.", is_lost=True)
    return _Fault(f"the Hub's client gave up ({detail})", "Check the name and what is published.")


def _refusal(status: int, headers: Mapping[str, str], message: str) -> _Fault:
    said = f" ({printable(_first_line(message))})" if message else ""
    what = f"the Hub answered {status}{said}"
    if status >= 500:
        return _Fault(what, "The Hub has a fault; try again later.", is_lost=True)
    wait = headers.get("Retry-After")
    if status == 429 and wait:
        return _Fault(what, f"Wait {printable(wait)} seconds and try again.")
    return _Fault(what, _ADVICE.get(status, ""))


def _first_line(text: str) -> str:
    """The text on one line, since the client's messages have several."""
    return " ".join(text.split())[:300]
