"""What a server of the OpenAI protocol answers: its text, or what went wrong and whether to try again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

#: statuses after which the same request may succeed
_PASSING = {408, 409, 425, 429, *range(500, 600)}
#: statuses that every other request will meet as well: no key, no money, no such model
_HOPELESS = {401, 402, 404}
#: reasons of a 429 that waiting does not cure
_SPENT = {"insufficient_quota", "billing_hard_limit_reached"}


class EndpointError(OSError):
    """A request that failed for good.

    >>> EndpointError("the server says no", ["429 slow down", "500 oops"]).errors
    ('429 slow down', '500 oops')
    """

    def __init__(self, message: str, errors: Sequence[str] = (), hopeless: bool = False) -> None:
        """Keep what each attempt met, and whether other requests will meet the same."""
        super().__init__(message)
        self.errors, self.hopeless = tuple(errors), hopeless


class Failure(OSError):
    """One failed attempt: what may be done about it."""

    def __init__(
        self, message: str, *, status: int = 0, again: bool = True, wait: float = 0.0, field: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.again, self.wait, self.field = status, again, wait, field
        # What this request met, every other one will meet as well.
        self.hopeless = status in _HOPELESS or (status == 429 and not again)


def reply_text(response: Mapping[str, Any]) -> str:
    """Return the text of the first choice of a chat completion, "" if there is none.

    >>> reply_text({"choices": [{"message": {"role": "assistant", "content": "42"}}]})
    '42'
    """
    content = response["choices"][0]["message"].get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def checked(response: Any) -> dict[str, Any]:
    """Return a completion if it is one.

    Raises:
        Failure: it has no choice with a message.
    """
    if isinstance(response, dict) and response.get("error"):
        raise Failure(f"the server answers with an error: {json.dumps(response['error'], ensure_ascii=False)[:300]}")
    choices = response.get("choices") if isinstance(response, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict) or not isinstance(first.get("message"), dict):
        raise Failure(f"the answer is no chat completion: {json.dumps(response, ensure_ascii=False)[:80]}")
    return response


def status_failure(error: Any, key_variable: str) -> Failure:
    """Return the failure that the library's error for a status of 400 or more means."""
    details = error.body if isinstance(error.body, dict) else {}
    told = " ".join(str(details.get("message") or error.message).split())[:300]
    status, field = error.status_code, details.get("param")
    again = status in _PASSING and not {str(details.get("code")), str(details.get("type"))} & _SPENT
    key = f" (the key comes from the argument or from {key_variable})" if status == 401 else ""
    return Failure(
        f"{status} {told}{key}",
        status=status,
        again=again,
        wait=retry_after(error.response.headers) if again else 0.0,
        field=field if isinstance(field, str) else "",
    )


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that a response asks to wait, 0.0 if it does not say.

    >>> retry_after({"retry-after": "2.5"}), retry_after({"retry-after-ms": "40"}), retry_after({})
    (2.5, 0.04, 0.0)
    >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}), retry_after({"retry-after": "soon"})
    (0.0, 0.0)
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        told = headers.get(name)
        if told is None:
            continue
        try:
            seconds = float(told) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(told).timestamp() - time.time()
            except ValueError:
                seconds = 0.0
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    return 0.0


def reason(error: BaseException) -> str:
    """Return what is at the bottom of a chain of errors."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return str(error) or type(error).__name__
