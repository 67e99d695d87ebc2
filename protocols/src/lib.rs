//! Protocol drivers: nodes that reach storage and have no children.
