"""The methods: one file each, this folder is their registry."""
