"""The intermediate representation: graphs, the canonical names of operations, tangents, what is known about a node, errors."""
