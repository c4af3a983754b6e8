# cppvmm_add_module(NAME
#   [COMPONENT]            # an optional component of the package: find_package(cppvmm COMPONENTS NAME) asks for it
#   INTERFACE  files...    # front door and public partitions: installed, importable by consumers
#   INTERNAL   files...    # implementation and internal partitions: a private file set, never installed
#   LINKS      targets...  # what importers need too
#   NEEDS      targets...  # what only the build of this module needs (header-only third parties)
# )
# Makes the static library cppvmm_NAME, its alias cppvmm::NAME, and its install rules. Paths are relative to the
# source root, so that a module's front door (modules/) and its partitions (NAME/) share one file set.
#
# The modules without COMPONENT are the package: a consumer of it finds all of them and needs nothing but threads. A
# COMPONENT is for a module whose importers need more (its LINKS name a third party): it has an export set of its own,
# and cppvmm-config.cmake.in says what must be found before it.
function(cppvmm_add_module name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "COMPONENT" "" "INTERFACE;INTERNAL;LINKS;NEEDS")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "cppvmm_add_module(${name}): unknown arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  list(TRANSFORM arg_INTERFACE PREPEND "${cppvmm_SOURCE_DIR}/")
  list(TRANSFORM arg_INTERNAL PREPEND "${cppvmm_SOURCE_DIR}/")

  set(target cppvmm_${name})
  add_library(${target} STATIC)
  add_library(cppvmm::${name} ALIAS ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name} POSITION_INDEPENDENT_CODE ON CXX_SCAN_FOR_MODULES ON)
  target_compile_features(${target} PUBLIC cxx_std_23)
  target_sources(${target}
    PUBLIC FILE_SET interface TYPE CXX_MODULES BASE_DIRS "${cppvmm_SOURCE_DIR}" FILES ${arg_INTERFACE})
  if(arg_INTERNAL)
    target_sources(${target}
      PRIVATE FILE_SET internal TYPE CXX_MODULES BASE_DIRS "${cppvmm_SOURCE_DIR}" FILES ${arg_INTERNAL})
  endif()
  target_link_libraries(${target} PUBLIC Threads::Threads ${arg_LINKS})
  foreach(need IN LISTS arg_NEEDS)
    target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:${need}>)
  endforeach()

  if(CPPVMM_INSTALL)
    if(arg_COMPONENT)
      set(export cppvmm-${name}-targets)
    else()
      set(export cppvmm-targets)
    endif()
    install(TARGETS ${target} EXPORT ${export}
      ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
      FILE_SET interface DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/cppvmm/modules")
    set_property(GLOBAL APPEND PROPERTY CPPVMM_EXPORT_SETS ${export})
  endif()
endfunction()
