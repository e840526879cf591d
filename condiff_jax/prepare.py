"""Mode `prepare`: `data.path` from the downloaded archives in `prepare.source`."""

from __future__ import annotations

import sys
from pathlib import Path

from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.schema import Config
from condiff_jax.data.builders.prepare import prepare, report
from condiff_jax.data.builders.units import BoxesError, OutputError, SourceError


def run(config: Config) -> None:
    """Prepare, resume, or notice that all is done."""
    settings = config.prepare
    needed = {
        "prepare.builder": settings.builder,
        "prepare.source": settings.source,
        "data.path": config.data.path,
    }
    for field, value in needed.items():
        if not value:
            raise ConfigError(field, "empty; mode prepare needs it")
    out = Path(config.data.path).expanduser()
    try:
        manifest = prepare(
            settings.builder,
            Path(settings.source).expanduser(),
            out,
            boxes=settings.boxes,
            shard_mb=settings.shard_mb,
            processes=settings.processes,
        )
    except BoxesError as error:
        raise ConfigError("prepare.boxes", one_line(error)) from error
    except SourceError as error:
        raise ConfigError("prepare.source", one_line(error)) from error
    except (OutputError, OSError) as error:
        raise ConfigError("data.path", one_line(error)) from error
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from there.")
    report(manifest, settings.builder, out)
