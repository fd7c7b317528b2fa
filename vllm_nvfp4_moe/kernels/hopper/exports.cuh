// What Python calls beside `run`, through ctypes (launch.py). Included last: it needs GEMMS.

// Lets the kernels have the shared memory that they need, on the current device. Returns a
// cudaError_t, as `run` does.
EXPORTED int prepare() {
    for (const Gemms& gemms : GEMMS)
        if (const int error = gemms.allow_shared_memory()) return error;
    return 0;
}

EXPORTED const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

// What Python has of its own, to be compared at load.
EXPORTED int launch_spec_bytes() { return sizeof(LaunchSpec); }
EXPORTED int gate_bytes() { return sizeof(Gate); }
EXPORTED int tile_bytes() { return sizeof(Tile); }
EXPORTED int place_bytes() { return sizeof(Place); }
EXPORTED int tile_shape_bytes() { return sizeof(TileShapeNumbers); }
EXPORTED int tile_shape_count() { return sizeof(GEMMS) / sizeof(*GEMMS); }
EXPORTED void tile_shape(int number, TileShapeNumbers* shape) { *shape = GEMMS[number].shape; }
