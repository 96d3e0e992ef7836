# The GPUs that the plugin library is built for by default.

# Sets `result` to machine code for each of these compute capabilities that nvcc supports, and PTX of the newest one up to
# 10.0, which later GPUs compile when the library is loaded. PTX of 12.0 would leave out 11.0 (Jetson Thor).
function(supported_architectures result)
  set(wanted 80 86 89 90 100 120)
  set(newest_ptx 100)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE supported)
  string(REGEX MATCHALL "[0-9]+" supported "${supported}")
  set(architectures)
  set(ptx)
  foreach(architecture IN LISTS wanted)
    if(NOT architecture IN_LIST supported)
      message(STATUS "nvcc does not support sm_${architecture}: the plugin has no machine code for it")
      continue()
    endif()
    if(architecture EQUAL 90)
      list(APPEND architectures 90a-real) # with the products of a warpgroup, which the virtual architecture does not have
    else()
      list(APPEND architectures ${architecture}-real)
    endif()
    if(architecture LESS_EQUAL newest_ptx)
      set(ptx ${architecture}-virtual)
    endif()
  endforeach()
  set(${result} ${architectures} ${ptx} PARENT_SCOPE)
endfunction()
