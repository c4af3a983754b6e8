// A check of clang-tidy that finds nothing: it has the others look at what a file declares itself, and not at all that
// it imports, which takes most of their time and is looked at where it is declared.
#include <clang-tidy/ClangTidyCheck.h>
#include <clang-tidy/ClangTidyModule.h>
#include <clang-tidy/ClangTidyModuleRegistry.h>
#include <clang/AST/ASTContext.h>
#include <clang/ASTMatchers/ASTMatchFinder.h>
#include <vector>

namespace {

using namespace clang;

class OwnDeclarations : public tidy::ClangTidyCheck {
public:
  using ClangTidyCheck::ClangTidyCheck;
  void registerMatchers(ast_matchers::MatchFinder* finder) override {
    finder->addMatcher(ast_matchers::translationUnitDecl().bind("unit"), this);
  }
  void check(const ast_matchers::MatchFinder::MatchResult& result) override {
    const auto& sources = *result.SourceManager;
    std::vector<Decl*> own;
    for (Decl* const each : result.Context->getTranslationUnitDecl()->noload_decls())
      if (!each->isFromASTFile() && !sources.isInSystemHeader(each->getLocation())) own.push_back(each);
    result.Context->setTraversalScope(own);
  }
};

class OwnDeclarationsModule : public tidy::ClangTidyModule {
public:
  void addCheckFactories(tidy::ClangTidyCheckFactories& factories) override {
    factories.registerCheck<OwnDeclarations>("cppvmm-own-declarations");
  }
};

const tidy::ClangTidyModuleRegistry::Add<OwnDeclarationsModule>
    added("cppvmm-module", "has the others look at what a file declares itself");

} // namespace
