"""A job: what a person asks for. All mistakes in a job are reported together, each with the nearest valid value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cached_property
from pathlib import PurePath, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from prefect_segmind.api.request import (
    ImageWeight,
    MagicPromptOption,
    NegativePrompt,
    Prompt,
    Seed,
    StyleType,
    listed_resolution,
)
from prefect_segmind.api.resolutions import AUTO, DEFAULT_RESOLUTION, similar_resolution
from prefect_segmind.errors import InvalidJobError, redact
from prefect_segmind.jobs.address import SecretAddress, UnclearAddress, check_address
from prefect_segmind.text import BLANK, CONTROL, Spelled, as_written, spelled, stripped

ALLOWED = {
    "name": 'a path of at most 200 bytes whose segments hold no control characters and none of \\ : * ? " < > |, '
    "begin with no dot, end with neither dot nor space, and are no device of Windows such as con or nul.txt",
    "image": "a local path, s3://bucket/key, or an http(s):// address without credentials or a signature in it",
    "image_file": "a URI that the provider can GET",
    "prompt": "a text that is not blank",
    "image_weight": "an integer from 1 to 100",
    "magic_prompt_option": "one of " + ", ".join(MagicPromptOption),
    "negative_prompt": "a text, or nothing",
    "resolution": f"{AUTO} or one of the 78 values from RESOLUTION_512_1536 to RESOLUTION_1536_640",
    "seed": "an integer from 100 to 999999, `random`, or nothing for one derived from the job",
    "style_type": "one of " + ", ".join(StyleType),
    "allow_extreme_ratio": "true or false",
}
"""The allowed values of each field, in the words of an error message."""
LONGEST_NAME = 120
"""The most bytes of an image's stem in a job's name."""
_NAME_BYTES = 200  # file systems allow 255 in a segment
_IMAGE_BYTES = 4096  # no system takes a longer path, and no bucket a longer key
# Control characters, those that end a line or turn the direction of a text too, and what no disk of Windows takes.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\\:*?"<>|]')
# Whatever follows the dot: https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_DEVICE = re.compile(r"(?i)(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\.|\Z)")
_STEM_END = f"{BLANK[:-1]}.-]"
_STEM_ENDS = re.compile(rf"\A{_STEM_END}+|(?<!{_STEM_END}){_STEM_END}+\Z")
_SCHEME = re.compile(r"(?i)(?:https?|s3):")
_SECRET = "holds a secret, which the run's parameters would keep; give the s3:// address instead"
_UNCLEAR = (
    "may hold a secret in its query or fragment, which the run's parameters would keep; only plain parameters are "
    "taken, such as ?w=800&q=80&v=3: leave the others out, or give a file or an s3:// address instead"
)


def _safe_name(name: str) -> str:
    segments = name.split("/")
    if _UNSAFE.search(name) or any(not s.strip() or s[0] == "." or s[-1] in ". " or _DEVICE.match(s) for s in segments):
        raise ValueError("unsafe")
    if len(name.encode()) > _NAME_BYTES:
        raise ValueError("too long")
    return name


def _image_location(image: object) -> object:
    text = str(image) if isinstance(image, PurePath) else image
    if not isinstance(text, str):
        raise ValueError("not a text")
    if "\0" in text or len(text.encode(errors="replace")) > _IMAGE_BYTES:
        raise ValueError("no path and no address")
    if "://" not in text:
        if _SCHEME.match(text):
            raise ValueError("unsupported address")
        return text
    scheme, _, rest = text.partition("://")
    if (scheme := scheme.lower()) == "s3":
        host, _, path = rest.partition("/")
        if "@" in host:
            raise ValueError(_SECRET)
    else:
        if CONTROL.search(text):
            raise ValueError("unsupported address")
        parts = urlsplit(text)
        host, path = parts.netloc, parts.path.strip("/")
        try:
            check_address(text)
        except SecretAddress:
            raise ValueError(_SECRET) from None
        except UnclearAddress:
            raise ValueError(_UNCLEAR) from None
    if scheme not in ("s3", "http", "https") or not host or not path:
        raise ValueError("unsupported address")
    return f"{scheme}://{rest}"


def _job_resolution(value: str, info: ValidationInfo) -> str:
    return value if value == AUTO else listed_resolution(value, info)


class Job(BaseModel):
    """What a person asks for. `parse_job` makes one and reports every mistake.

    Attributes:
        name: Where the picture goes in the archive, `hero/summer` for example; the image's stem if left out.
        image: A local path, `s3://bucket/key`, or an `http(s)://` address.
        prompt: What the picture should show.
        image_weight: 1 to 100; higher keeps more of the source image.
        magic_prompt_option: Whether the model may rewrite the prompt.
        negative_prompt: What the picture should not show. The provider may ignore it for this model.
        resolution: One of the 78 listed sizes, or `AUTO` for the one nearest to the image's ratio.
        seed: 100 to 999999, `random`, or None for one derived from the job.
        style_type: The style.
        allow_extreme_ratio: Whether an image beyond 1:3 to 3:1 is accepted.

    Example:
        >>> Job(image="photos/mug.jpg", prompt="a red mug").name
        'mug'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, AfterValidator(_safe_name)] = ""
    image: Annotated[Prompt, BeforeValidator(_image_location)]
    prompt: Prompt
    image_weight: ImageWeight = 50
    magic_prompt_option: MagicPromptOption = MagicPromptOption.AUTO
    negative_prompt: NegativePrompt = None
    resolution: Annotated[str, AfterValidator(_job_resolution)] = DEFAULT_RESOLUTION
    seed: Seed | Literal["random"] | None = None
    style_type: StyleType = StyleType.GENERAL
    allow_extreme_ratio: bool = False

    @cached_property
    def written(self) -> dict[str, str]:
        """The texts as written, if in another spelling; not part of the job's identity."""
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_spelling(cls, values: Any, handler: ModelWrapValidatorHandler[Job]) -> Job:
        if not isinstance(values, Mapping):
            return handler(values)
        clean = {field: _clean(field, value) for field, value in values.items()}
        if clean.get("name") in (None, ""):
            image = clean.get("image")
            clean.pop("name", None)
            clean |= {"name": name_from_image(str(image))} if isinstance(image, str | PurePath) else {}
        job = handler(clean)
        texts = {field: as_written(text) for field in _TEXTS if isinstance(text := clean.get(field), str)}
        vars(job)["written"] = {
            field: text for field, text in texts.items() if text.strip() and text != getattr(job, field)
        }
        return job

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialize the texts as written, from which both spellings can be restored."""
        return {field: self.written.get(field, value) for field, value in handler(self).items()}

    def parameters(self) -> dict[str, Any]:
        """The parameters of the API, as JSON values, without the image and those that are None."""
        values = self.model_dump(mode="json", exclude={"name", "image", "allow_extreme_ratio"}, exclude_none=True)
        return {**values, **{field: getattr(self, field) for field in values if field in self.written}}


_TEXTS = ("prompt", "negative_prompt")


def _clean(field: str, value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Enum):
        return value
    # The form of a file's name is looked up later, and a blank value is shown as it is.
    return (stripped(value) if field == "image" else spelled(value)) or value


def name_from_image(image: str) -> str:
    r"""The default name of a job: the image's stem made safe.

    A key in S3 is not a URL, so nothing in it is decoded.

    Args:
        image: A local path, `s3://bucket/key`, or an `http(s)://` address.

    Example:
        >>> name_from_image("s3://bucket/inbox/Summer mug #1?.jpg")
        'Summer mug #1'
        >>> name_from_image("https://b.example/Summer%20mug.jpg?size=large")
        'Summer mug'
        >>> name_from_image("C:\\photos\\.hidden.png")
        'hidden'
        >>> name_from_image("con.jpg")
        'image-con'
    """
    stem = PurePosixPath(_path_of(image)).stem
    name, was = _safe_stem(spelled(stem)), _safe_stem(stem)
    return name if name == was else Spelled(name, was)


def _safe_stem(stem: str) -> str:
    safe = _STEM_ENDS.sub("", _UNSAFE.sub("-", stem)).encode(errors="ignore")
    stem = _STEM_ENDS.sub("", safe[:LONGEST_NAME].decode(errors="ignore")) or "image"
    return f"image-{stem}" if _DEVICE.match(stem) else stem


def suffix_from_image(image: str) -> str:
    """The extension of an image, without its dot and in lower case; empty if it has none.

    Args:
        image: As for `name_from_image`.

    Example:
        >>> suffix_from_image("s3://bucket/inbox/mug #1.JPEG"), suffix_from_image("https://b.example/mug.png?size=1")
        ('jpeg', 'png')
    """
    return _UNSAFE.sub("-", PurePosixPath(_path_of(image)).suffix).lower().strip(". -")


def _path_of(image: str) -> str:
    """The path or the key of an image, decoded if it is part of a URL, which a key in S3 is not."""
    if image[:5].lower() == "s3://":
        return image[5:].partition("/")[2]
    if "://" not in image:
        return image.replace("\\", "/")
    try:
        return unquote(urlsplit(image).path)
    except ValueError:  # not a URL, which the check of `image` reports
        return ""


def parse_job(values: Mapping[str, Any], *, allow_unlisted_resolution: bool = False) -> Job:
    """Make a job of plain values.

    Args:
        values: The fields of `Job`.
        allow_unlisted_resolution: Whether sizes beyond the 78 are accepted.

    Raises:
        InvalidJobError: A line for each wrong field, with its value, the allowed values and the nearest valid one.

    Example:
        >>> parse_job({"image": "mug.jpg", "prompt": "a red mug", "style_type": "realistic"})
        Traceback (most recent call last):
        prefect_segmind.errors.InvalidJobError: The job has 1 mistake; nothing was uploaded or paid.
          style_type: 'realistic' is not allowed; allowed is one of GENERAL, REALISTIC, ... Did you mean REALISTIC?
    """
    try:
        return Job.model_validate(values, context={"allow_unlisted_resolution": allow_unlisted_resolution})
    except ValidationError as error:
        lines = explain(error, Job)
        many = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        text = f"The job has {many}; nothing was uploaded or paid."
        raise InvalidJobError("\n  ".join([text, *lines])) from None


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each wrong field: its name and value, the allowed values, and the nearest valid one if there is one.

    Args:
        error: pydantic's error.
        model: The model whose fields were checked.
    """
    lines: dict[str, str] = {}
    for each in error.errors():
        field = str(each["loc"][0]) if each["loc"] else "job"
        known = each["type"] != "extra_forbidden"
        lines.setdefault(field, describe_mistake(field, each) if known else unknown(field, model.model_fields))
    return list(lines.values())


def describe_mistake(field: str, mistake: ErrorDetails, allowed: str | None = None) -> str:
    """One line for a field that is wrong or missing.

    Args:
        field: The name of the field.
        mistake: pydantic's error.
        allowed: The allowed values, if not those of `ALLOWED`.

    Returns:
        The line: the name of the field, its value, the allowed values, and the nearest valid one if there is one.
    """
    allowed = allowed or ALLOWED.get(field, "an object of named fields")
    if mistake["type"] == "missing":
        return f"{field}: missing; needed is {allowed}"
    value = mistake["input"]
    given = shown(repr(value.value if isinstance(value, Enum) else value))
    if (problem := mistake["msg"].removeprefix("Value error, ")) in (_SECRET, _UNCLEAR):
        scheme, _, rest = str(value).partition("://")
        host = re.split(r"[/?#]", rest)[0].rpartition("@")[2]
        return f"{field}: {shown(repr(f'{scheme}://{host}/…'))} {problem}"
    near = nearest_value(field, value)
    return f"{field}: {given} is not allowed; allowed is {allowed}." + (f" Did you mean {near}?" if near else "")


def unknown(name: object, known: Iterable[str], what: str = "field") -> str:
    """A message about a name that does not exist, with the nearest that does, or with all.

    Args:
        name: The name as given.
        known: The names that exist.
        what: What the names are of, such as `field`.

    Example:
        >>> unknown("varients", ["vars", "variants"])
        'varients: there is no such field. Did you mean variants?'
    """
    near = difflib.get_close_matches(str(name).lower(), known := list(known), n=1)
    remedy = f". Did you mean {near[0]}?" if near else f"; allowed is one of {', '.join(known)}"
    return f"{shown(name)}: there is no such {what}{remedy}"


def shown(value: object) -> str:
    """A value in an error message: one short line without secrets.

    Args:
        value: The value.
    """
    text = text if (text := redact(str(value))).isprintable() else repr(text)
    return text if len(text) <= 80 else text[:79] + "…"


def nearest_value(field: str, value: object) -> str | None:
    """The allowed value nearest to a wrong one; None if none is near.

    Args:
        field: The name of the field.
        value: The wrong value.

    Example:
        >>> nearest_value("resolution", "RESOLUTION_800_1280"), nearest_value("image_weight", 150)
        ('RESOLUTION_768_1280', '100')
    """
    if value is None:
        return None
    text = str(value).strip().upper()
    ranges = {"image_weight": (1, 100), "seed": (100, 999_999)}
    if field in ranges:
        if isinstance(value, bool) or not re.fullmatch(r"[-+]?\d{1,18}(\.\d{1,9})?", text):
            return "random" if field == "seed" and difflib.get_close_matches(text, ["RANDOM"]) else None
        low, high = ranges[field]
        return str(min(max(round(float(text)), low), high))
    if field == "resolution" and (similar := similar_resolution(text)):
        return similar.value
    choices: dict[str, Iterable[str]] = {
        "magic_prompt_option": MagicPromptOption,
        "style_type": StyleType,
        "resolution": [AUTO],
    }
    near = difflib.get_close_matches(re.sub(r"[\s-]+", "_", text), list(choices.get(field, ())), n=1)
    return str(near[0]) if near else None
