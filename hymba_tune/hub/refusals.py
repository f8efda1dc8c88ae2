"""Turns the errors of the Hub's client into messages that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hymba_tune.errors import HubError

LOG_IN = "hf auth login, with a token that may write (https://huggingface.co/settings/tokens)"
SECRET = re.compile(r"hf_\w{8,}|\?\S*")
"""Tokens and the query strings of addresses. A signed address grants access for some hours, like a token."""


@contextmanager
def refusals_explained(action: str, retry: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into a `HubError` without secrets.

    Args:
        action: The action, as an infinitive that completes "Cannot".
        retry: The advice for errors that pass.

    Raises:
        HubError: Instead of any other error. The original is suppressed, as it may contain secret addresses.
    """
    try:
        yield
    except HubError:
        raise
    except OfflineModeIsEnabled:
        raise HubError(f"Cannot {action}: HF_HUB_OFFLINE is set.", fix="unset it") from None
    except Exception as error:  # includes errors of the HTTP transport, after several retries by the client
        if (refusal := _refusal_behind(error)) is not None:
            raise _explained(refusal, action, retry) from None
        reason = SECRET.sub("", str(error)) or type(error).__name__
        raise HubError(f"Cannot {action}: the connection to the Hub failed ({reason}).", fix=retry) from None


def _refusal_behind(error: BaseException | None) -> HfHubHTTPError | None:
    """Return the Hub's response error, which another error may wrap."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _explained(error: HfHubHTTPError, action: str, retry: str) -> HubError:
    status = error.response.status_code
    if status == 401:
        return HubError(f"Cannot {action}: the Hub rejects the token as invalid.", fix=LOG_IN)
    if status == 403:
        return HubError(f"Cannot {action}: the token does not permit it.", fix=LOG_IN)
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if (wait or "").isdigit() else "in a few minutes"
        return HubError(f"Cannot {action}: too many requests to the Hub.", fix=f"{when}: {retry}")
    if status >= 500:
        return HubError(f"Cannot {action}: the Hub has an internal error ({status}).", fix=f"later: {retry}")
    reason = SECRET.sub("", error.server_message or str(error)).strip()
    return HubError(f"Cannot {action}: {reason} (error {status}).", fix=retry)
