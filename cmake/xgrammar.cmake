# xgrammar: what a grammar allows next, as bits. Only the C++ core, as a static library; its sources are
# the archive that deploy/fetch-sources downloads (Apache License 2.0; picojson and dlpack are in it).

file(STRINGS ${PROJECT_SOURCE_DIR}/deploy/sources.txt line REGEX "^xgrammar ")
string(REGEX REPLACE " +" ";" line "${line}")
list(GET line 1 archive)
list(GET line 2 sha256)
set(archive_path ${PROJECT_SOURCE_DIR}/.cache/sources/${archive})
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/deploy/sources.txt)

if(NOT EXISTS ${archive_path})
  execute_process(COMMAND ${PROJECT_SOURCE_DIR}/deploy/fetch-sources RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${archive} is missing: run deploy/fetch-sources")
  endif()
endif()
file(SHA256 ${archive_path} found)
if(NOT found STREQUAL sha256)
  message(FATAL_ERROR "${archive_path} has sha256 ${found}, expected ${sha256}: delete it, run deploy/fetch-sources")
endif()

set(unpacked ${CMAKE_BINARY_DIR}/sources)
string(REGEX REPLACE "\\.tar\\.gz$" "" folder "${archive}")
set(folder ${unpacked}/${folder})

# Unpacked anew only when the archive or what is mended changes.
file(SHA256 ${CMAKE_CURRENT_LIST_FILE} recipe)
set(stamp ${unpacked}/xgrammar.${sha256}.${recipe})
if(NOT EXISTS ${stamp})
  file(ARCHIVE_EXTRACT INPUT ${archive_path} DESTINATION ${unpacked})
  # Strings with minLength or maxLength may not hold control characters either (0.2.9 forgets it), and a
  # pattern that no JSON string matches is not to be expanded into what is no JSON, but refused by name.
  set(converter ${folder}/cpp/json_schema_converter.cc)
  file(READ ${converter} before)
  string(REPLACE [[AddCharacterClass({{'"', '"'}, {'\\', '\\'}, {'\r', '\r'}, {'\n', '\n'}}, true)]]
    [[AddCharacterClass({{0, 0x1f}, {'"', '"'}, {'\\', '\\'}}, true)]] mended "${before}")
  string(REPLACE [[  return AddSubGrammar(Grammar::FromEBNF(RegexToEBNF(regex)));]]
    [[  if (json_string && can_use_fsm) {
    try {
      RegexToEBNF(regex);
    } catch (const std::exception& error) {
      throw std::runtime_error("the pattern '" + regex + "': " + error.what());
    }
    throw std::runtime_error("the pattern '" + regex + "' matches no string as it stands in JSON, where quotes, "
                             "backslashes and control characters are escaped");
  }
  return AddSubGrammar(Grammar::FromEBNF(RegexToEBNF(regex)));]] after "${mended}")
  if(before STREQUAL mended OR mended STREQUAL after)
    message(FATAL_ERROR "${archive}: what is mended here is not there any more")
  endif()
  file(WRITE ${converter} "${after}")
  file(TOUCH ${stamp})
endif()

file(GLOB sources ${folder}/cpp/*.cc ${folder}/cpp/converter_ext/*.cc ${folder}/cpp/support/*.cc)
# Holds a name of another.
set_source_files_properties(${folder}/cpp/json_schema_converter.cc PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
add_library(xgrammar STATIC ${sources})
set_target_properties(xgrammar PROPERTIES CXX_STANDARD 17)
target_compile_options(xgrammar PRIVATE -w)  # not ours to mend
target_include_directories(xgrammar SYSTEM PUBLIC
  ${folder}/include ${folder}/3rdparty/picojson ${folder}/3rdparty/dlpack/include)
# XGRAMMAR_LOG_CUSTOMIZE: who links it has xgrammar::LogMessageImpl and LogFatalImpl.
target_compile_definitions(xgrammar PUBLIC
  XGRAMMAR_LOG_CUSTOMIZE=1 XGRAMMAR_ENABLE_CPPTRACE=0 XGRAMMAR_ENABLE_INTERNAL_CHECK=0)
target_link_libraries(xgrammar PRIVATE Threads::Threads)
