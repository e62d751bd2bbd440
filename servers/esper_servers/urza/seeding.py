from __future__ import annotations

from collections.abc import Iterator

from esper_rpc.proto.urza.v1 import Blueprint, SaveBlueprintRequest
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.blueprints.extras import compute_extras


def installed_blueprints() -> Iterator[SaveBlueprintRequest]:
    """Describe every installed blueprint, its extras computed from the module."""
    for _, factory in sorted(load_factories().items()):
        blueprint = Blueprint(descriptor=factory.descriptor(), manifest=factory.manifest(), tags=factory.tags)
        yield SaveBlueprintRequest(blueprint=blueprint, extras_json=compute_extras(factory))
