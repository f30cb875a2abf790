//! Certificates, QUIC, frames, enrolment.

pub mod token {
    //! Enrolment tokens.
}
