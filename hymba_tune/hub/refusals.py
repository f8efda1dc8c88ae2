"""What the Hub refuses, in words that help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hymba_tune.errors import HubError

LOG_IN = "hf auth login, with a token that may write (https://huggingface.co/settings/tokens)"
SECRET = re.compile(r"hf_\w{8,}|\?\S*")
"""Tokens, and what stands behind the question mark of an address: a signature, for some hours as good as a token."""


@contextmanager
def refusals_explained(what: str, again: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one message without secrets.

    Args:
        what: What is being done, to go on from "Cannot".
        again: How to go on when it works again.

    Raises:
        HubError: Instead of the client's errors, which are not shown: they may quote addresses that are secret.
    """
    try:
        yield
    except HubError:
        raise
    except OfflineModeIsEnabled:
        raise HubError(f"Cannot {what}: HF_HUB_OFFLINE forbids all that needs the network.", fix="unset it") from None
    except Exception as error:  # and whatever the transport below raises; the client has tried several times by then
        if (refusal := _refusal_behind(error)) is not None:
            raise _explained(refusal, what, again) from None
        said = SECRET.sub("", str(error)) or type(error).__name__
        raise HubError(f"Cannot {what}: the connection to the Hub broke ({said}).", fix=again) from None


def _refusal_behind(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer, which the client may have wrapped."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _explained(error: HfHubHTTPError, what: str, again: str) -> HubError:
    status = error.response.status_code
    if status == 401:
        return HubError(f"Cannot {what}: the Hub does not know the token.", fix=LOG_IN)
    if status == 403:
        return HubError(f"Cannot {what}: the token may not do that.", fix=LOG_IN)
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if (wait or "").isdigit() else "in a few minutes"
        return HubError(f"Cannot {what}: the Hub has had too many requests.", fix=f"{when}: {again}")
    if status >= 500:
        return HubError(f"Cannot {what}: the Hub has trouble of its own (error {status}).", fix=f"later: {again}")
    said = SECRET.sub("", error.server_message or str(error)).strip()
    return HubError(f"Cannot {what}: {said} (error {status}).", fix=again)
