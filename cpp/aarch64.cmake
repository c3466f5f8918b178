# Cross-compiles for 64-bit ARM Linux and runs what it built under emulation: the C++ tests on a machine of another
# kind. cmake -S cpp -B build/aarch64 --toolchain aarch64.cmake -DPOTLUCK_TESTS=ON
#
# Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user-static. The emulated processor has all that is
# known; the environment variable QEMU_CPU names another: cortex-a72 (Raspberry Pi 4) runs the baseline only,
# cortex-a76 (Pi 5) the dot products too.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -L /usr/aarch64-linux-gnu)
