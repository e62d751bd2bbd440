"""Generated. Do not edit."""

from .identity_service_pb2 import (
    EnrollRequest as EnrollRequest,
    EnrollResponse as EnrollResponse,
    RenewCertificateRequest as RenewCertificateRequest,
    RenewCertificateResponse as RenewCertificateResponse,
)
