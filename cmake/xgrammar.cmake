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

# Replaces `before` in the text `source`.
function(mend before after)
  string(REPLACE "${before}" "${after}" mended "${source}")
  if(mended STREQUAL source)
    message(FATAL_ERROR "${archive}: this is to be mended, and not there any more: ${before}")
  endif()
  set(source "${mended}" PARENT_SCOPE)
endfunction()

if(NOT EXISTS ${stamp})
  file(ARCHIVE_EXTRACT INPUT ${archive_path} DESTINATION ${unpacked})
  set(converter ${folder}/cpp/json_schema_converter.cc)
  file(READ ${converter} source)
  # Strings with minLength or maxLength may not hold control characters either (0.2.9 forgets it).
  mend([[AddCharacterClass({{'"', '"'}, {'\\', '\\'}, {'\r', '\r'}, {'\n', '\n'}}, true)]]
    [[AddCharacterClass({{0, 0x1f}, {'"', '"'}, {'\\', '\\'}}, true)]])
  # Half of a surrogate pair (\ud83d alone) is no character: many readers refuse the whole text.
  mend([[{ByteString("u"),
       hexadecimal_character,]]
    [[{ByteString("u"),
       builder_.AddCharacterClass({{'A', 'C'}, {'E', 'F'}, {'a', 'c'}, {'e', 'f'}, {'0', '9'}}),]])
  mend([[Choice({escaped_character, unicode_escape})]]
    [[Choice(
      {escaped_character,
       unicode_escape,
       Sequence(
           {ByteString("u"),
            builder_.AddCharacterClass({{'D', 'D'}, {'d', 'd'}}),
            builder_.AddCharacterClass({{'0', '7'}}),
            hexadecimal_character,
            hexadecimal_character}
       ),
       Sequence(
           {ByteString("u"),
            builder_.AddCharacterClass({{'D', 'D'}, {'d', 'd'}}),
            builder_.AddCharacterClass({{'8', '9'}, {'A', 'B'}, {'a', 'b'}}),
            hexadecimal_character,
            hexadecimal_character,
            ByteString("\\u"),
            builder_.AddCharacterClass({{'D', 'D'}, {'d', 'd'}}),
            builder_.AddCharacterClass({{'C', 'F'}, {'c', 'f'}}),
            hexadecimal_character,
            hexadecimal_character}
       )}
  )]])
  mend([[u[0-9a-fA-F]{4}))*)"]]
    [[u([0-9abcefABCEF][0-9a-fA-F]{3}|[dD]([0-7][0-9a-fA-F]{2}|[89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))))*)"]])
  # A pattern that no JSON string matches is not to be expanded into what is no JSON, but refused by name.
  mend([[  return AddSubGrammar(Grammar::FromEBNF(RegexToEBNF(regex)));]]
    [[  if (json_string && can_use_fsm) {
    try {
      RegexToEBNF(regex);
    } catch (const std::exception& error) {
      throw std::runtime_error("the pattern '" + regex + "': " + error.what());
    }
    throw std::runtime_error("the pattern '" + regex + "' matches no string as it stands in JSON, where quotes, "
                             "backslashes and control characters are escaped");
  }
  return AddSubGrammar(Grammar::FromEBNF(RegexToEBNF(regex)));]])
  file(WRITE ${converter} "${source}")
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
