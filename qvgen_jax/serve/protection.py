"""What the page's browser may do, and which names the server answers to."""

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio's page runs scripts that it writes into itself and builds functions from text. What counts
# here is the rest: nothing is loaded from, sent to, or shown in another place.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)


class OnlyFromHere:
    """Adds the policy to every answer: a browser then refuses what would leave the machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                headers.append((b"referrer-policy", b"no-referrer"))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, with_policy)


def middleware(local: Sequence[str]) -> list[Middleware]:
    """Of the server.

    Args:
        local: where it listens to this machine alone, its address as URLs write it. Then it answers
            to this and this machine's usual names alone, or another page could make its own name
            mean this machine (DNS rebinding) and use it.
    """
    wrapped = [Middleware(OnlyFromHere)]
    if local:
        names = ["localhost", "127.0.0.1", "[::1]", *local]
        wrapped.append(Middleware(TrustedHostMiddleware, allowed_hosts=names))
    return wrapped
