"""The errors of this package, with the HTTP statuses that they stand for and what to do about them.

A message names the field or setting that is wrong and what to do. It never contains a key or a signed URL: every
message is redacted when the error is created. The meanings of the statuses are the provider's.
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Self

from prefect_segmind.redaction import redact as redact  # what makes a message takes it from here
from prefect_segmind.redaction import writable as writable

if TYPE_CHECKING:
    from prefect_segmind.api.picture import Answered


@dataclass(eq=False, repr=False)
class SegmindError(Exception):
    """The base of all errors of this package.

    Args:
        message: What went wrong and what to do; keys and signatures in it are redacted.

    Attributes:
        status: The HTTP status of the answer, if there was one.
        retry_after: Seconds that the server asks to wait.
        possibly_billed: Whether the outcome is unknown and the request may have been paid for.
        request_id: The provider's `x-request-id`.
        answered: The facts in the headers of a 200 that was read to its end and held no picture.
        fingerprint: The job's, where it is known.
        requests_sent: How many requests this run has sent for the job, the failed one included.
        cost_usd: What this run has paid for the job for certain.
        possibly_billed_usd: What requests of unknown outcome may have cost, as far as this run has to report them.
        decision: What follows a failed request: wait or stop.
        stage: Where a job of a batch failed: `validate`, `upload`, `generate`, `archive` or `publish`.
    """

    message: InitVar[str]
    _: KW_ONLY
    status: int | None = None
    retry_after: float | None = None
    possibly_billed: bool = False
    request_id: str | None = None
    answered: Answered | None = None
    fingerprint: str | None = None
    requests_sent: int = 0
    cost_usd: Decimal = Decimal("0.00")
    possibly_billed_usd: Decimal = Decimal("0.00")
    decision: Decision | None = None
    stage: str | None = None

    def __post_init__(self, message: str) -> None:
        """Make the exception of the redacted message."""
        super().__init__(redact(message))

    def with_facts(self, message: str | None = None, **facts: Any) -> Self:
        """A copy of the error with more facts, since an error gets its facts when it is created.

        Args:
            message: Another message; the same if None.
            facts: Attributes by name.

        Example:
            >>> RateLimitError("…", status=429).with_facts(stage="generate").stage
            'generate'
        """
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        return type(self)(message or str(self), **known | facts).with_traceback(self.__traceback__)


class InputError(SegmindError):
    """What was asked for cannot be done as it stands; nothing was uploaded or paid."""


class InvalidJobError(InputError):
    """Fields of a job are wrong; the message has a line for each of them."""


class SourceImageError(InputError):
    """The source image is missing, unreadable, or of a kind that is refused."""


class ConfigurationError(InputError):
    """A setting, a block or an environment variable is missing or wrong."""


class StoreError(SegmindError):
    """An address in S3 or on disk could not be read or written."""


class BucketNotFoundError(StoreError):
    """The bucket does not exist, or not at this endpoint."""


class StoreAccessError(StoreError):
    """The credentials are valid, but not for this."""


class StoreCredentialsError(StoreError):
    """There are no S3 credentials, or they are wrong or expired."""


class StoreUnreachableError(StoreError):
    """The S3 endpoint does not answer."""


class PreconditionFailedError(StoreError):
    """A conditional write lost: somebody else has written the object since it was read."""


class OutboxError(StoreError):
    """The outbox, the folder for paid pictures, cannot take another one."""


class ArchiveError(StoreError):
    """A paid picture could not be archived; it is safe in the outbox."""


class OutcomeUnknownError(SegmindError):
    """An earlier request for this job may have been paid, and `on_unknown="fail"` forbids another."""


class SubmittedError(SegmindError):
    """The provider has accepted a request and not finished it; whoever runs the job next fetches the picture unpaid."""


class KeptElsewhereError(SegmindError):
    """A picture is paid for and lies in an outbox that this machine cannot read; it is not paid for again."""


class ManifestError(InputError):
    """A manifest has mistakes; the message has a line for each of them."""


class BudgetReachedError(SegmindError):
    """The budget of a run has no room for another picture."""


class SharedBudgetReachedError(BudgetReachedError):
    """A budget that the run shares with others has none, whatever its own has."""


class NotApprovedError(SegmindError):
    """A person declined what a run would cost. Nothing was paid."""


class ApprovalTimeoutError(NotApprovedError):
    """Nobody approved in time what a run would cost. Nothing was paid."""


class UnusableAnswersError(SegmindError):
    """A batch was stopped after several consecutive paid answers without a picture."""


class RunCancelledError(SegmindError):
    """The run was ended from outside: Ctrl-C, SIGTERM, SIGHUP, a cancellation in Prefect."""


class NotStartedError(SegmindError):
    """The run stopped before the next request for this job was sent; the error's cause has the reason."""


class ApiError(SegmindError):
    """The API refused a request, failed, or could not be reached.

    Attributes:
        statuses: The HTTP statuses that a class of these errors stands for; a subclass may narrow them.
        advice: What a user can do about it; empty if the message itself contains that.
    """

    statuses: ClassVar[tuple[int, ...]] = ()
    advice: ClassVar[str] = ""


class AccountError(ApiError):
    """The account cannot use the API: every further request would fail the same way."""


class BadRequestError(ApiError):
    """The request is malformed, or `image_file` cannot be fetched."""

    statuses = (400,)
    advice = "check the parameters, and that the provider can fetch the uploaded image"


class InvalidKeyError(AccountError):
    """The key is missing or wrong."""

    statuses = (401,)
    advice = "set SEGMIND_API_KEY, or the api_key of the SegmindCredentials block, to a valid key"


class PermissionDeniedError(AccountError):
    """The key may not use this model."""

    statuses = (403,)
    advice = "ask the account's owner to allow this model for the key"


class EndpointNotFoundError(AccountError):
    """No such model or endpoint."""

    statuses = (404,)
    advice = "check SEGMIND_BASE_URL and the model's page at the provider"


class MethodNotAllowedError(ApiError):
    """The address does not accept a POST, mostly because of a wrong base URL."""

    statuses = (405,)
    advice = "check SEGMIND_BASE_URL"


class NotAcceptableError(ApiError):
    """The request is not acceptable, for a reason that the answer does not name."""

    statuses = (406,)
    advice = "read the provider's message and change what it names"


class InsufficientCreditsError(NotAcceptableError):
    """No credits left, or the team's spend limit is reached."""

    advice = "add credits to the account or raise its spend limit, then run again"


class ParameterRejectedError(NotAcceptableError):
    """The value of a parameter was rejected."""

    advice = "change the parameter that the message names"


class ContentTypeRejectedError(NotAcceptableError):
    """The Content-Type was rejected."""

    advice = "check any proxy on the way to the API: it changed the Content-Type header"


class ModelRetiredError(AccountError):
    """The model is no longer served."""

    statuses = (410,)
    advice = "the provider has retired the model; look for its successor"


class UnprocessableError(ApiError):
    """The safety check or the inference refused the request."""

    statuses = (422,)
    advice = "change the prompt or the image"


class RateLimitError(ApiError):
    """Too many requests."""

    statuses = (429,)
    advice = "run fewer at once, or ask the provider for a higher limit"


class InternalServerError(ApiError):
    """The provider failed, mostly because of a parameter that it cannot use."""

    statuses = (500,)
    advice = "check the parameters; if they are right, run again later"


class BadGatewayError(ApiError):
    """Temporarily unavailable; the picture may have been made and billed."""

    statuses = (502,)
    advice = "run again later; the provider's usage page shows whether it was billed"


class GatewayTimeoutError(ApiError):
    """Timed out on the way; the picture may have been made and billed."""

    statuses = (504,)
    advice = "run again later; the provider's usage page shows whether it was billed"


class OverloadedError(ApiError):
    """The provider is overloaded; it has generated nothing and bills nothing."""

    statuses = (503, 529)
    advice = "the provider is overloaded and has generated nothing; run again later"


class UnexpectedStatusError(ApiError):
    """A status that the contract does not name."""

    advice = "check SEGMIND_BASE_URL and any proxy on the way"


class ApiUnreachableError(ApiError):
    """The connection failed before the request was sent."""


class AnswerCutError(ApiError):
    """The answer is certainly incomplete: read time-out, lost connection, half a picture. It may be billed."""


class NotAnImageError(ApiError):
    """A 200 without a picture in it: HTML, nothing, or bytes that do not decode. It is billed if it was read whole."""


class UnsafeImageError(NotAnImageError):
    """A 200 with `is_image_safe: false` and without a picture. It is billed."""


@dataclass(eq=False, repr=False, kw_only=True)
class ResultLinkError(NotAnImageError):
    """A link to a paid picture could not be followed, or leads to none.

    Attributes:
        gone: Whether it never will: the host has no such picture, the address is refused, or it is something else.
    """

    gone: bool = False


class SubmissionUnknownError(ApiError):
    """A submitted request was accepted, but its answer does not say where to ask for the picture. It may be billed."""


class ForgottenError(ApiError):
    """The provider no longer has a submitted request; only its request history may."""


class HistoryError(ApiError):
    """The provider's request history cannot be read; what became of a lost request stays unknown."""


STATUS_ERRORS: dict[int, type[ApiError]] = {
    status: kind
    for kind in tuple(globals().values())
    if isinstance(kind, type) and issubclass(kind, ApiError)
    for status in vars(kind).get("statuses", ())
}
"""The class for each documented status."""


def status_error(status: int, text: str) -> type[ApiError]:
    """The class for an HTTP status; for a 406 it depends on the provider's message.

    Args:
        status: Any status but 200.
        text: The error text of the answer.

    Example:
        >>> status_error(406, "Insufficient credits: balance 0.01, need 0.05").__name__
        'InsufficientCreditsError'
    """
    if status != 406:
        return STATUS_ERRORS.get(status, UnexpectedStatusError)
    words = text.lower()
    unquoted = re.sub(
        r"\"[^\"]*\"|`[^`]*`|(?<!\w)'[^']*'(?!\w)", " ", words
    )  # a quoted prompt may contain such words too
    if re.search(r"credit|balance|spend|quota|billing|top.?up", unquoted):
        return InsufficientCreditsError
    if re.search(r"content.?type|media type", words):
        return ContentTypeRejectedError
    if re.search(r"param|value|field|invalid|allowed|must be|range|expected", words):
        return ParameterRejectedError
    return NotAcceptableError


@dataclass(frozen=True)
class Decision:
    """The decision after a failed request.

    Attributes:
        wait_seconds: Seconds to wait before the next request; None to stop.
        reason: Why, in a few words for the log.
    """

    wait_seconds: float | None
    reason: str

    @property
    def retry(self) -> bool:
        """Whether another request follows."""
        return self.wait_seconds is not None
