"""Adapters: one file per framework that a run can talk to. A new framework gets a file here."""
