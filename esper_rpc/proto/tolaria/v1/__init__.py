"""Generated. Do not edit."""

from .tolaria_service_pb2 import (
    Checkpoint as Checkpoint,
    CreateCheckpointRequest as CreateCheckpointRequest,
    CreateCheckpointResponse as CreateCheckpointResponse,
    GetStatusRequest as GetStatusRequest,
    GetStatusResponse as GetStatusResponse,
    RollbackRequest as RollbackRequest,
    RollbackResponse as RollbackResponse,
    RollbackTier as RollbackTier,
    SignalEmergencyRequest as SignalEmergencyRequest,
    SignalEmergencyResponse as SignalEmergencyResponse,
    WatchEmergenciesRequest as WatchEmergenciesRequest,
    WatchEmergenciesResponse as WatchEmergenciesResponse,
    WatchMetricsRequest as WatchMetricsRequest,
    WatchMetricsResponse as WatchMetricsResponse,
)
