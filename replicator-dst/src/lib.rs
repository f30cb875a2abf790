//! The destination: receives batches, makes them durable, applies each as a
//! whole to a replica that nobody else can write to, and fails over.

pub mod apply;
pub mod objects;
