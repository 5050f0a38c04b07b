"""Frontends: three ways to turn an nn.Module into a graph (symbolic, export, live). A new frontend gets a file here."""
