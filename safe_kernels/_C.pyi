torch_version: str  # that it was compiled against
compiler: str  # its version
