"""The closed set of exceptions that `peft_gradproj` raises on its own account.

Every message says what was wrong, where, what was expected and what to do. Each class also derives from the
built-in exception that callers of PEFT and diffusers already catch for the same mistake.
"""

__all__ = [
    "AdapterFolderError",
    "BehaviourError",
    "ConceptBasisError",
    "ConceptDataError",
    "GradProjConfigError",
    "GradProjError",
    "HubError",
    "OnlineProjectionError",
    "SignatureError",
]


class GradProjError(Exception):
    """Base class of every error that this package raises on purpose."""


class GradProjConfigError(GradProjError, ValueError):
    """A `GradProjConfig` asks for something that would escape, or cannot be given, the projection."""


class ConceptBasisError(GradProjError, ValueError):
    """A concept basis is malformed, degenerate, or does not fit the model or file that it is used with."""


class ConceptDataError(GradProjError, ValueError):
    """A concept set, reference set or set of concept probes is empty, malformed or does not fit the model."""


class OnlineProjectionError(GradProjError, RuntimeError):
    """The online projection cannot be carried out in this training loop."""


class AdapterFolderError(GradProjError, ValueError):
    """A published adapter folder is missing something, is malformed, or is refused as unsafe to read."""


class HubError(GradProjError, OSError):
    """The Hub cannot be reached, refuses what was asked of it, or gave a broken answer."""


class SignatureError(GradProjError, ValueError):
    """A signature cannot be made or checked: a key is unusable, or the `signing` extra is not installed."""


class BehaviourError(GradProjError, ValueError):
    """An adapter's behaviour cannot be measured: the base model, the adapter and the probes do not fit."""
