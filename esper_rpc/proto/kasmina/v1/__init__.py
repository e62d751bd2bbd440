"""Generated. Do not edit."""

from .gates_pb2 import (
    GateCheck as GateCheck,
    GateEvent as GateEvent,
    GateResult as GateResult,
)
from .kasmina_service_pb2 import (
    AdvanceAlphaRequest as AdvanceAlphaRequest,
    AdvanceAlphaResponse as AdvanceAlphaResponse,
    ApplyCommandRequest as ApplyCommandRequest,
    ApplyCommandResponse as ApplyCommandResponse,
    EmergencyCleanupRequest as EmergencyCleanupRequest,
    EmergencyCleanupResponse as EmergencyCleanupResponse,
    ExportSeedStatesRequest as ExportSeedStatesRequest,
    ExportSeedStatesResponse as ExportSeedStatesResponse,
    FinalizeStepRequest as FinalizeStepRequest,
    FinalizeStepResponse as FinalizeStepResponse,
    ForeignParameter as ForeignParameter,
    GetStatusRequest as GetStatusRequest,
    GetStatusResponse as GetStatusResponse,
    IssuerFence as IssuerFence,
    SeedEvent as SeedEvent,
    UpdateEpochRequest as UpdateEpochRequest,
    UpdateEpochResponse as UpdateEpochResponse,
    ValidateParametersRequest as ValidateParametersRequest,
    ValidateParametersResponse as ValidateParametersResponse,
    WatchSeedEventsRequest as WatchSeedEventsRequest,
    WatchSeedEventsResponse as WatchSeedEventsResponse,
)
