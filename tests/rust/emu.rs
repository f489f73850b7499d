//! What the embedded driver promises, call by call.
