"""Rows of tokens between devices whose memory is one address space (NVLink)."""
