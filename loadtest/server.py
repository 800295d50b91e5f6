"""What a server says of itself before the load begins."""

import json
import urllib.error
import urllib.request
from typing import Any

from loadtest.client import Target
from loadtest.errors import ServerNotReady
from loadtest.host import is_this_host
from loadtest.report import Server

_TIMEOUT_S = 10.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def inspect(target: Target, settings: dict[str, str] | None = None) -> Server:
    """The server at `target`, whose settings are known if it was started here. Raises ServerNotReady."""
    _get(target, "/readyz")
    model = _get(target, "/model")
    try:
        name = f"{model['model']['name']} {model['model']['version']}"
        variant, precision, engine = model["variant"], model["precision"], model["engine"]
    except (KeyError, TypeError) as error:
        raise ServerNotReady(f"{target.url}/model is not that of a ddetr server: {str(model)[:200]}") from error
    return Server(
        url=target.url,
        started_here=settings is not None,
        on_this_host=is_this_host(target.url),
        model=name,
        variant=variant,
        precision=precision,
        engine=engine,
        settings=settings or {},
    )


def _get(target: Target, path: str) -> Any:
    url = target.url + path
    headers = {} if target.api_key is None else {"Authorization": f"Bearer {target.api_key}"}
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:  # it is the answer, too
            content = error.read(500).decode("utf-8", "replace")
        if error.code == 401:
            found = "another" if target.api_key is not None else "none was given"
            raise ServerNotReady(f"{url}: it wants an API key, {found}: --api-key-file FILE") from error
        raise ServerNotReady(f"{url}: not ready: {error.code} {content}") from error
    except urllib.error.URLError as error:
        raise ServerNotReady(f"{url}: no answer: {error.reason}") from error
    except (OSError, ValueError) as error:
        raise ServerNotReady(f"{url}: not the answer of a ddetr server: {error}") from error
