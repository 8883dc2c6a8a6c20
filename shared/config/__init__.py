"""What configuration files say, as frozen pydantic models; `shared.configfile` reads them.

Two kinds, kept apart on purpose. `federation.toml` is what all must agree on (`federation`, with `learning`, `merging`
and `privacy`); its canonical hash goes into the fingerprint that every manifest carries. `coordinator.toml` and
`site.toml` are each machine's own business (`machine`).
"""

from shared.config.federation import COORDINATOR_USER, FederationConfig, FederationSection, SiteName, TrustSection
from shared.config.learning import (
    IMPORTANCE_PLAN,
    SPARSE,
    AdapterKind,
    AdapterSection,
    CodecName,
    CodecSection,
    ImportanceName,
    LayersSection,
    ModelSection,
    StateCodecName,
    TaskSection,
    TrainingSection,
)
from shared.config.machine import (
    AdmissionSection,
    BrokerSection,
    ComputeSection,
    CoordinatorConfig,
    DataSection,
    LinkSection,
    LocalLayersSection,
    LocalTrustSection,
    Precision,
    PrefixSection,
    SiteConfig,
    StateDType,
    ValidationSection,
)
from shared.config.merging import (
    AggregationSection,
    MergeRule,
    Missing,
    Mode,
    Quality,
    ServerOptimizerName,
    ServerSection,
    StalenessKind,
    StalenessSection,
)
from shared.config.privacy import Clipping, LocalPrivacySection, PrivacySection
from shared.config.section import FOLDER_OR_ID, Positive, Section

__all__ = [
    "COORDINATOR_USER",
    "FOLDER_OR_ID",
    "IMPORTANCE_PLAN",
    "SPARSE",
    "AdapterKind",
    "AdapterSection",
    "AdmissionSection",
    "AggregationSection",
    "BrokerSection",
    "Clipping",
    "CodecName",
    "CodecSection",
    "ComputeSection",
    "CoordinatorConfig",
    "DataSection",
    "FederationConfig",
    "FederationSection",
    "ImportanceName",
    "LayersSection",
    "LinkSection",
    "LocalLayersSection",
    "LocalPrivacySection",
    "LocalTrustSection",
    "MergeRule",
    "Missing",
    "Mode",
    "ModelSection",
    "Positive",
    "Precision",
    "PrefixSection",
    "PrivacySection",
    "Quality",
    "Section",
    "ServerOptimizerName",
    "ServerSection",
    "SiteConfig",
    "SiteName",
    "StalenessKind",
    "StalenessSection",
    "StateCodecName",
    "StateDType",
    "TaskSection",
    "TrainingSection",
    "TrustSection",
    "ValidationSection",
]
