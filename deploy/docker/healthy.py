"""The container's health: exit status 0 where the server beside it answers /readyz with 200, else 1 and why not.

It asks on $DDETR_PORT (8000 if unset), as the server listens on it: a container whose port is set by a flag needs the
variable, too. With `livez` as its argument it asks /livez: not whether requests should come, but whether to restart.
"""

import http.client
import os
import sys

TIMEOUT_S = 4.0


def main() -> int:
    """Ask once."""
    port = int(os.environ.get("DDETR_PORT") or 8000)
    path = f"/{sys.argv[1] if len(sys.argv) > 1 else 'readyz'}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        sys.stdout.write(f"{path} {response.status} {response.read(500).decode(errors='replace')}\n")
    except (OSError, http.client.HTTPException) as error:
        sys.stdout.write(f"{path} on port {port}: {error}\n")
        return 1
    finally:
        connection.close()
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
