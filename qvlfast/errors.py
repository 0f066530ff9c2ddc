"""Every exception that a user of the package can meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class QvlfastError(Exception):
    """Base class of all errors raised on purpose by this package."""


class CheckpointError(QvlfastError):
    """A checkpoint is missing, damaged, or of a kind this package does not run."""


class BackendError(QvlfastError):
    """The requested backend or device cannot do what was asked of it."""


class InputError(QvlfastError, ValueError):
    """One input is at fault; other inputs of the same call are not affected.

    ``code`` is a short stable word for programs, the message is for people:

    =================== ===========================================================
    ``invalid_type``    a value of the wrong Python type, or an unknown key
    ``invalid_value``   a value out of range, such as a negative ``fps``
    ``invalid_text``    text that cannot be tokenised, such as lone surrogates
    ``not_found``       a media file that does not exist
    ``unreadable``      a media file that cannot be decoded
    ``too_large``       a media file over the size, pixel or frame limit
    ``aspect_ratio``    a picture more than 200 times longer than wide
    ``not_allowed``     a URL outside ``allow_media_domains``
    ``fetch_failed``    an allowed URL that could not be fetched
    ``too_long``        more tokens than ``max_length``
    ``non_finite``      the model answered NaN or infinity, or zeros alone
    =================== ===========================================================
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        return type(self), (self.code, str(self))


class QueueFull(QvlfastError):  # noqa: N818  # like queue.Full
    """So much work waits that a new request was not accepted.

    Attributes:
        retry_after: seconds after which there should be room again.
        queued: the waiting work, in tokens.
    """

    def __init__(self, retry_after: float, queued: float) -> None:
        super().__init__(
            f"the queue is full ({queued:.0f} tokens of work wait): "
            f"try again in {retry_after:.1f} s"
        )
        self.retry_after = retry_after
        self.queued = queued

    def __reduce__(self) -> tuple[type[QueueFull], tuple[float, float]]:
        return type(self), (self.retry_after, self.queued)


class DeadlineError(QvlfastError, TimeoutError):
    """A request was not answered within its ``timeout``; it was dropped."""


class BatchError(QvlfastError):
    """Some items of a call failed; the others are done and kept.

    Attributes:
        results: what the call would have returned, with NaN (or zero, for integer
            vectors) in the failed rows.
        errors: the exception of each failed item, by its index in the call.
    """

    def __init__(self, results: Any, errors: Mapping[int, Exception]) -> None:
        self.results = results
        self.errors = dict(errors)
        shown = [f"  item {i}: {error}" for i, error in list(self.errors.items())[:5]]
        if len(self.errors) > len(shown):
            shown.append(f"  … and {len(self.errors) - len(shown)} more")
        count = len(self.errors)
        super().__init__(
            f"{count} item{'s' if count > 1 else ''} failed; the other results are in `.results`, "
            "all errors in `.errors`\n" + "\n".join(shown)
        )

    def __reduce__(self) -> tuple[type[BatchError], tuple[Any, dict[int, Exception]]]:
        return type(self), (self.results, self.errors)
