"""``python -m trapline_service.openapi`` prints the API's schema: what clients are generated from."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from trapline_service.app import create_app
from trapline_service.config import Settings


def main() -> None:
    # The state directory is never looked at: the lifespan does not run.
    app = create_app(Settings(state_dir=Path(tempfile.gettempdir())))
    print(json.dumps(app.openapi(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
