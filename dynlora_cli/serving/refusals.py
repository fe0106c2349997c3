"""What a client is told when a request cannot be answered: OpenAI's form of errors, with the status codes of HTTP.

400 the request must change        401 the key is wrong            403 not from here
404 no such model or address       408 the request came too slowly 413 it is too large
415 it is no JSON                  429 the queue is full           500 a fault of ours
503 stopping, or out of memory     504 the answer took too long
"""

from __future__ import annotations

from typing import Any

from dynlora_cli.errors import DynloraError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong and what to do, for the client's developer.
        code: OpenAI's word for it, for programs.
        param: the field of the request.
        kind: OpenAI's type of the error; by default that of the status.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.kind = kind or _TYPES.get(status, "invalid_request_error")
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """What stands in the answer, and in a stream that has begun."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def in_words(error: DynloraError) -> str:
    """An error of ours, with what to do next."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


def no_model(message: str) -> Refusal:
    """There is no model of that name."""
    return Refusal(404, message, code="model_not_found", param="model")


def too_slow(seconds: float) -> Refusal:
    """The answer was not ready in time."""
    message = f"the answer was not ready after {seconds:g} s; ask for fewer tokens, or start the server with --timeout"
    return Refusal(504, message, code="timeout")


def stopping() -> Refusal:
    """The server takes nothing new."""
    return Refusal(503, "the server is stopping", code="stopping", retry_after=10)
