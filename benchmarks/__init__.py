import os

# As stages/shared/process.py sets it for every stage; torch reads it when it is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
