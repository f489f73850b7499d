//! A driver that records calls. (Being written.)
