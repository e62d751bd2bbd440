"""Generated. Do not edit."""

from .blueprint_pb2 import (
    BlueprintDescriptor as BlueprintDescriptor,
    BlueprintParameterBounds as BlueprintParameterBounds,
    BlueprintTier as BlueprintTier,
)
from .breaker_pb2 import (
    CircuitState as CircuitState,
)
from .budgets_pb2 import (
    MemoryBudgets as MemoryBudgets,
    PerformanceBudgets as PerformanceBudgets,
    SystemLimits as SystemLimits,
)
from .bus_pb2 import (
    BusEnvelope as BusEnvelope,
    BusMessageType as BusMessageType,
    DeliveryGuarantee as DeliveryGuarantee,
    EventEnvelope as EventEnvelope,
    MessagePriority as MessagePriority,
)
from .command_pb2 import (
    AdaptationCommand as AdaptationCommand,
    CommandCircuitBreaker as CommandCircuitBreaker,
    CommandOptimizerAdjustment as CommandOptimizerAdjustment,
    CommandSeedOperation as CommandSeedOperation,
    CommandType as CommandType,
    SeedOperation as SeedOperation,
)
from .emergency_pb2 import (
    EmergencyLevel as EmergencyLevel,
    EmergencySignal as EmergencySignal,
)
from .envelope_pb2 import (
    SignedEnvelope as SignedEnvelope,
)
from .kernel_pb2 import (
    KernelArtifactError as KernelArtifactError,
    KernelArtifactReady as KernelArtifactReady,
    KernelCatalogUpdate as KernelCatalogUpdate,
    KernelPrefetchRequest as KernelPrefetchRequest,
)
from .outcome_pb2 import (
    CommandOutcome as CommandOutcome,
)
from .policy_pb2 import (
    PolicyUpdate as PolicyUpdate,
)
from .report_pb2 import (
    FieldReport as FieldReport,
    FieldReportOutcome as FieldReportOutcome,
    MitigationAction as MitigationAction,
)
from .rules_pb2 import (
    FieldRules as FieldRules,
)
from .safety_pb2 import (
    BSDS as BSDS,
    BSDSFailed as BSDSFailed,
    BSDSIssued as BSDSIssued,
    BenchmarkReport as BenchmarkReport,
    BlueprintBenchmark as BlueprintBenchmark,
    BlueprintBenchmarkProfile as BlueprintBenchmarkProfile,
    HandlingClass as HandlingClass,
    HazardBand as HazardBand,
    Provenance as Provenance,
    ResourceProfile as ResourceProfile,
)
from .seed_pb2 import (
    SeedLifecycleGate as SeedLifecycleGate,
    SeedLifecycleStage as SeedLifecycleStage,
    SeedState as SeedState,
)
from .state_pb2 import (
    HardwareContext as HardwareContext,
    SystemStatePacket as SystemStatePacket,
)
from .telemetry_pb2 import (
    HealthStatus as HealthStatus,
    MetricPoint as MetricPoint,
    SystemHealth as SystemHealth,
    TelemetryEvent as TelemetryEvent,
    TelemetryLevel as TelemetryLevel,
    TelemetryPacket as TelemetryPacket,
    TraceSpan as TraceSpan,
)
