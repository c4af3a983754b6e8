# cppvmm_install_package(): the package config of every module that cppvmm_add_module() made, so that
# find_package(cppvmm) works from an install prefix. Called once, at the root, after the modules.
include(CMakePackageConfigHelpers)

function(cppvmm_install_package)
  set(destination "${CMAKE_INSTALL_LIBDIR}/cmake/cppvmm")
  get_property(exports GLOBAL PROPERTY CPPVMM_EXPORT_SETS)
  list(REMOVE_DUPLICATES exports)
  foreach(export IN LISTS exports)
    install(EXPORT ${export} NAMESPACE cppvmm:: DESTINATION "${destination}" CXX_MODULES_DIRECTORY cxx-modules)
  endforeach()
  configure_package_config_file("${cppvmm_SOURCE_DIR}/cmake/cppvmm-config.cmake.in"
    "${cppvmm_BINARY_DIR}/cppvmm-config.cmake" INSTALL_DESTINATION "${destination}" NO_SET_AND_CHECK_MACRO)
  # Before 1.0 a minor version may break; a module's object code is of one architecture.
  write_basic_package_version_file("${cppvmm_BINARY_DIR}/cppvmm-config-version.cmake" COMPATIBILITY SameMinorVersion)
  install(FILES "${cppvmm_BINARY_DIR}/cppvmm-config.cmake" "${cppvmm_BINARY_DIR}/cppvmm-config-version.cmake"
    DESTINATION "${destination}")
  install(FILES "${cppvmm_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
endfunction()
